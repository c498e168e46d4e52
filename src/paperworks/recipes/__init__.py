"""The recipes, one package a room and one module a paper; `paperworks.lab.recipe.recipes` finds them."""
