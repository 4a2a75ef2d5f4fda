#!/usr/bin/env bash
# Runs the fuzzers one after the other, beginning with the seeds and the kept corpus. Fails at the first finding, which
# lies in BUILD/found-*; replay it with `BUILD/fuzz_... FILE`. New inputs that reach more code go to BUILD/corpus.
#
# Usage: runtimes/native/tests/fuzz.sh BUILD SECONDS      both together, the weights files most of them
set -euo pipefail

[[ $# -eq 2 ]] || { echo "usage: fuzz.sh BUILD SECONDS" >&2; exit 2; }
build="$1"
tests="$(dirname "${BASH_SOURCE[0]}")"
export UBSAN_OPTIONS=print_stacktrace=1

"$build/fuzz_seeds" "$build/seeds"
run() {
    local format="$1" seconds="$2"
    shift 2
    mkdir -p "$build/corpus/$format"
    echo "=== $format, $seconds s"
    "$build/fuzz_$format" -max_total_time="$seconds" -timeout=20 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$build/found-$format-" "$@" "$build/corpus/$format" "$tests/corpus/$format" "$build/seeds/$format"
}
run state $(($2 / 10 + 1)) -max_len=2048
run manifest $(($2 / 5 + 1)) -max_len=8192 -dict="$tests/fuzz_manifest.dict"
run program $(($2 * 7 / 10 + 1)) -max_len=16384
