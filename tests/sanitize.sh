#!/usr/bin/env bash
# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Builds the package in a copy of the tree, without CUDA, and runs the tests of the ops there. Any finding ends the run.
#
#     tests/sanitize.sh FOLDER [PYTEST ARGUMENTS]
#
# FOLDER takes the copy. PYTHON names the interpreter (python), MAX_JOBS the compilers at a time. Wanted: gcc with
# libasan and libubsan. The leak checker is off: the interpreter keeps what it has until its end.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

(cd "$root" && tar -c --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE csrc kernels qcsbm_fast tests) |
    tar -x -C "$folder"
cd "$folder"

sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
QCSBM_CUDA=0 CXXFLAGS="$sanitizers -fno-omit-frame-pointer -g1 ${CXXFLAGS:-}" LDSHARED="${CXX:-g++} -shared" \
    LDFLAGS="$sanitizers ${LDFLAGS:-}" "$python" setup.py --quiet build_ext --inplace

export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:handle_segv=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONPATH="$folder"
if [ $# -eq 0 ]; then
    set -- tests/test_fuzz.py tests/test_noise.py tests/test_ops.py -k "not opcheck and not compile and not instruction_sets"
fi
exec "$python" -m pytest -q -x -p no:cacheprovider -p no:faulthandler "$@"
