"""The bundled model, carried as package data."""
