#!/usr/bin/env bash
# Everything that wants a GPU, in one go: the kernels' tests, the kernels against the machine's ceilings, and models
# of real size beside BackPACK, torch.func and curvlinops.
#
#   bench/gpu.sh OUT [--device cuda|cpu] [--quick]
#
# Tables (CSV), the roofline, a log of each step and summary.txt go to the folder OUT. All steps together take no more
# than TOTAL seconds (480), of which each has a share; one that fails or runs out of time stops none of the later ones.
# The exit status is 1 if any did. --quick takes tiny sizes: `bench/gpu.sh OUT --device cpu --quick` is a rehearsal.
set -euo pipefail

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
device=cuda
quick=()
backend=inductor
check=(--check)
while (($#)); do
    case $1 in
        --device) device=${2:?--device needs a name}; shift 2 ;;
        --quick) quick=(--quick) check=(); backend=aot_eager; shift ;;
        *) usage ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
total=${TOTAL:-480}
failures=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Graphs of whole networks take one compiler too long.
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$(nproc)}
: >"$out/summary.txt"

# step NAME SHARE COMMAND...: run it within SHARE percent of the time and what is left; @SECONDS in its arguments is
# the time in which it should end by itself.
step() {
    local name=$1 limit=$((total * $2 / 100)) left=$((total - SECONDS - 10)) start=$SECONDS status=0 verdict
    shift 2
    ((limit <= left)) || limit=$left
    if ((limit < 10)); then
        verdict="left out: no time"
    else
        printf '== %s, at most %d s\n' "$name" "$limit"
        timeout --kill-after=5 "$limit" "${@//@SECONDS/$((limit * 7 / 10))}" >"$out/$name.log" 2>&1 || status=$?
        case $status in
            0) verdict=passed ;;
            124 | 137) verdict="out of time" ;;
            *) verdict="failed with status $status" ;;
        esac
    fi
    [[ $verdict == passed ]] || failures=$((failures + 1))
    printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict" | tee -a "$out/summary.txt"
    # What the scripts found wrong; the rest is in the log.
    { grep -h '^CHECK\|^LEFT OUT\|^FAILED\|^ERROR' "$out/$name.log" 2>/dev/null || true; } | tee -a "$out/summary.txt"
}

# problem NAME SHARE ARGUMENTS...: a model beside its peers.
problem() {
    local name=$1 share=$2
    shift 2
    step "$name" "$share" "$python" bench/run.py --device "$device" --out "$out" --problems "$name" --rounds 10 \
        --budget 2 --limit 40 --seconds @SECONDS --without func:vmap_compile "${check[@]}" "${quick[@]}" "$@"
}

tests=(tests/test_kernels*.py)
chosen="not interpreter"
((${#quick[@]} == 0)) || chosen="on_a_gpu or operator"
step tests 12 "$python" -m pytest -n 0 -q -k "$chosen" "${tests[@]}"

# Without the definition under torch.compile: compiling it for every shape takes longer than all the rest.
step kernels 20 "$python" bench/kernels.py --device "$device" --out "$out" --plot "$out/roofline.png" \
    --against reference naive --rounds 10 --budget 0.5 --limit 30 --seconds @SECONDS "${quick[@]}"

first=(BatchGrad BatchL2Grad SumGradSquared Variance FirstOrderAll)
problem c 8 --extensions "${first[@]}" KFAC DiagGGNExact DiagGGNMC
problem d 10 --extensions "${first[@]}" KFAC DiagGGNMC
problem resnet18 10 --extensions "${first[@]}" KFAC
# The bar for these is the compiled gradient's time.
problem resnet50 26 --limit 70 --backend "$backend" --extensions FirstOrderAll KFAC BatchL2Grad SumGradSquared Variance BatchGrad
problem gpt2 14 --extensions BatchL2Grad SumGradSquared KFAC Variance

printf '\n%s\n' "$out/summary.txt"
cat "$out/summary.txt"
((failures == 0))
