"""The lab: what a nonlinearity costs, whether it trains stably, and whether it is there at all. Definitions and the report."""
