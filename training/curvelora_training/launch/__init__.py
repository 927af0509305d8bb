"""Batch scripts for clusters and for machines without one: `curvelora launch`, and the files below launch/."""
