"""The shipped recipes by what they write: many differ in their steps alone, and load alike."""

from mojax.recipe import choose, load_recipe, names


def encoding():
    """Those that encode weights; the others are of caches."""
    return tuple(n for n in names() if choose(load_recipe(n), "*").weights)


def distinct(among=None):
    """One for every set of rules, the one with the fewest steps."""
    first = {}
    for name in sorted(among or encoding(), key=lambda n: (len(load_recipe(n).steps), n)):
        first.setdefault(repr(load_recipe(name).rules), name)
    return tuple(sorted(first.values()))


def alike():
    """The others: their steps are tested where the steps are."""
    return tuple(n for n in encoding() if n not in distinct())
