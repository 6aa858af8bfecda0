"""Recipes that `dcjax train` and `dcjax plan` know by name; each is a file to copy. Nothing imports them."""
