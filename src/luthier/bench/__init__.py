"""Programs that measure: ``python -m luthier.bench.NAME``."""
