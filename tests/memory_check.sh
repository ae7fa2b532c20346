#!/bin/sh
# Every CPU kernel and a program with `out=` under valgrind (Debian: apt install valgrind): reads and writes beyond memory.
#
#     tests/memory_check.sh [python]          LOG=... keeps what valgrind says elsewhere; takes some ten minutes
#
# Ends with 0 and a sentence where nothing was found and the planted read was noticed, which shows that it was watching.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}
log=${LOG:-$(mktemp -t memory_check.XXXXXX)}
command -v valgrind > /dev/null || { echo "memory check: valgrind is not installed"; exit 2; }

suppressions=$(mktemp)
trap 'rm -f "$suppressions"' EXIT
# the loader reads strings by words
cat > "$suppressions" << 'END'
{
   loader, 8 bytes
   Memcheck:Addr8
   obj:*/ld-linux*.so*
}
END

# every allocation is by malloc, with room around it; one thread, so that a part is all that runs while it runs
PYTHONMALLOC=malloc OMP_NUM_THREADS=1 PYTHONPATH="$here/..:$here/kernels:$here/cases:$here/oracle${PYTHONPATH:+:$PYTHONPATH}" \
    valgrind --undef-value-errors=no --error-limit=no --redzone-size=256 --num-callers=8 --suppressions="$suppressions" -q \
    "$python" "$here/kernels/memory_check.py" 2> "$log"
status=$?
"$python" "$here/kernels/memory_check.py" --report "$log" || exit 1
[ $status -eq 0 ] || { echo "memory check: a result is wrong, or a part failed:"; tail -n 5 "$log"; exit 1; }
