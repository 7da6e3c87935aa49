"""Stage 6, the separate FID job: samples + reference images -> metrics and the report.

A door with rooms of its own, one for each thing that is measured; `__main__` chooses among them.
"""

from iar_jax.evaluate.scores import run as run
