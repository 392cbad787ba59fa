#!/bin/sh
# Makes the two environments that the peers run in: make_envs.sh FOLDER [PYTHON]
# gives FOLDER/llmcompressor and FOLDER/modelopt; does nothing for one that is there already.
# PYTHON is a Python 3.11 or newer, default python3.
set -eu

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [PYTHON]" >&2
    exit 2
fi
folder=$1
python=${2:-python3}

make() { # NAME PACKAGE VERSION MODULE OTHER_PACKAGES...
    name=$1 package=$2 version=$3 module=$4
    shift 4
    here=$folder/$name
    check="
import importlib.metadata, sys
import $module
sys.exit(importlib.metadata.version('$package') != '$version')"
    if [ -x "$here/bin/python" ] && "$here/bin/python" -c "$check" >/dev/null 2>&1; then
        echo "$here: $package $version is already there"
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "$0: $python is missing or older than 3.11; name another one as the second argument" >&2
        exit 1
    }
    [ -x "$here/bin/python" ] || "$python" -m venv "$here" || {
        echo "$0: no environment could be made in $here" >&2
        exit 1
    }
    "$here/bin/python" -m pip install --quiet --disable-pip-version-check "$package==$version" "$@" || {
        echo "$0: pip could not install $package==$version $*; run again to go on" >&2
        exit 1
    }
    "$here/bin/python" -c "$check" >/dev/null || {
        echo "$0: $here is not usable: $package $version does not import" >&2
        exit 1
    }
    echo "$here: installed $package $version"
}

make llmcompressor llmcompressor 0.14.0.1 llmcompressor torch==2.13.0
# ModelOpt imports requests without asking for it.
make modelopt nvidia-modelopt 0.47.0 modelopt.torch.quantization torch==2.13.0 transformers==5.23.0 accelerate requests
