#!/bin/sh
# Make demo ternary, check it, and publish it only if it is good enough:
#   sh examples/ci.sh [TEXT [RATIO [RELEASE]]]
# TEXT [notes.txt] is what it is measured on; RATIO [2] the most that its perplexity there may be,
# over the baseline's; RELEASE [release/demo-ternary] the folder to publish as, not there yet.
# In the environment: BASELINE, a model or a .json of ternq eval [demo]; DATA_DIR, a folder in the
# hub's layout, with which 200 questions of piqa are asked too. Reports go to reports/.
# Exit status: 0 published, 5 a gate failed, 75 stopped, others as in docs/cli.md.
set -eu
text=${1:-notes.txt}
ratio=${2:-2}
release=${3:-release/demo-ternary}

ended() {
    case $1 in
        0) echo "Published: $release" ;;
        5) echo "A gate failed, nothing is published: see reports/" ;;
        75 | 130) echo "Stopped, nothing is published: the same command goes on" ;;
        *) echo "Status $1, nothing is published: see above and reports/" ;;
    esac >&2
}
trap 'ended $?' EXIT

if [ -e "$release" ]; then echo "$release is there; a release is not replaced" >&2; exit 2; fi
mkdir -p reports "$(dirname "$release")"
ternq ternarize demo --json > reports/ternarize.json
ternq pack --verify demo-ternary --json > reports/verify.json
set -- --fail-if-ppl-ratio-above "$ratio" --fail-if-bpw-above 1.9 --fail-if-size-above 2.1MB
if [ -n "${DATA_DIR:-}" ]; then
    set -- "$@" --data-dir "$DATA_DIR" --limit 200 --fail-if-acc-below piqa=0.45
    text=$text,piqa
fi
ternq eval demo-ternary --tasks "$text" --baseline "${BASELINE:-demo}" "$@" --json \
    --summary-md "${GITHUB_STEP_SUMMARY:-reports/summary.md}" \
    --html reports/report.html --junit reports/junit.xml > reports/results.json
rm -rf "$release.part"
cp -R demo-ternary "$release.part"
mv "$release.part" "$release" # all of it or nothing
