"""Make the demo model ternary from Python, as ``ternq ternarize demo`` does.

    python examples/python_api.py [FOLDER]

writes the artefact to FOLDER, by default ``demo-ternary``. TERNQ_DEMO_STEPS shortens the demo.
"""

import sys
from pathlib import Path

from ternq.progress import Event
from ternq.recipe import default_recipe
from ternq.ternarize import ternarize


def show(event: Event) -> None:
    """Progress is an event; the library itself prints nothing."""
    if event.message:
        print(event.message, file=sys.stderr)


# for another model: Recipe(model=..., scheme=Scheme(...), training=Training(tokens=..., data=...))
recipe = default_recipe("demo")
out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-ternary")
result = ternarize("demo", out, recipe, progress=show)

for who in ("teacher", "untrained", "student"):
    print(f"{who:10} token perplexity {result[who]['perplexity']:.2f}")
print(f"{result['weights']['bpw_linear']:.3f} bits per weight of the linear layers, in {out}")
