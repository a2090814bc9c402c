#!/bin/sh
# A quality gate in a pipeline: sh examples/ci.sh notes.txt 2
#
# Exit status 5 when the ternary model is more than twice as perplexed by the text as its teacher
# (another ratio may be given), or its linear layers take more than 1.9 bits per weight; every status is in docs/cli.md.
# results.json holds one JSON object either way. TERNQ_DEMO_STEPS shortens the training.
set -eu
text=${1:-notes.txt}
ratio=${2:-2}

ternq ternarize demo --quiet
ternq pack --verify demo-ternary --quiet
ternq eval demo-ternary --tasks "$text" --baseline demo --quiet --json \
    --fail-if-ppl-ratio-above "$ratio" --fail-if-bpw-above 1.9 > results.json
