"""Recipes, one YAML file each, shipped as package data."""
