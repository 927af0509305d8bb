"""One file per method. To add one: write the file, then add its `METHOD` to `curvelora.registry`."""
