"""Make the demo model ternary from Python: a short training, to show the calls.

    python examples/python_api.py [FOLDER]

writes the artefact to FOLDER, by default ``demo-ternary``. TERNQ_DEMO_STEPS says how many steps are
trained, as it does for ``ternq ternarize demo``; 10 are far too few for a good student.
"""

import os
import sys
from pathlib import Path

from ternq import Recipe, Scheme, Training
from ternq.progress import Event
from ternq.ternarize import ternarize


def show(event: Event) -> None:
    """Progress is an event; the library itself prints nothing."""
    if event.message:
        print(event.message, file=sys.stderr)


steps = int(os.environ.get("TERNQ_DEMO_STEPS", "10"))
recipe = Recipe(model="demo", scheme=Scheme(group_size=128), training=Training(steps=steps))
out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-ternary")
result = ternarize("demo", out, recipe, progress=show)

for who in ("teacher", "untrained", "student"):
    print(f"{who:10} token perplexity {result[who]['perplexity']:.2f}")
print(f"{result['weights']['bpw_linear']:.3f} bits per weight of the linear layers, in {out}")
