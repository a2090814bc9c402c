#!/bin/sh
# A ternary model from nothing but a configuration and text, and its dense counterpart:
#   sh examples/from_scratch.sh TEXT OTHER [MODEL [STEPS]]
# TEXT is a file or folder to train on, OTHER a file to compare both on; MODEL [demo] gives
# configuration and tokenizer, no weights; STEPS [2000]. Rates and schedule are those of Spectra's
# smallest models (arXiv 2407.12327). Leaves trilm (packed), floatlm (a folder for transformers) and
# results.json.
set -eu
text=$1
other=$2
model=${3:-demo}
steps=${4:-2000}

set -- "$model" --from-scratch --objective ce --data "$text" --steps "$steps" --weight-decay 0.1
ternq distill "$@" --method absmean --lr 2.4e-3 --lr-second 1.5e-3 --decay-until 0.667 -o trilm.run
ternq distill "$@" --method float --lr 4e-4 --schedule cosine -o floatlm.run
ternq pack trilm.run -o trilm
ternq pack floatlm.run --format dense -o floatlm
ternq eval trilm --baseline floatlm --tasks "$other" --json > results.json
