"""One layer class per family of methods; see `curvelora.methods` for the methods themselves."""
