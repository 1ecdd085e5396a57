"""Studies: every arm trained with equal budget, evaluated and compared."""
