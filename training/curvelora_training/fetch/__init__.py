"""Bring what a recipe needs to machines without network: model, rows and wheels, with the hash of every file."""
