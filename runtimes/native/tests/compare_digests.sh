#!/usr/bin/env bash
# Fails where the kernels of a cross build give other bits than this machine's.
#
# Usage: runtimes/native/tests/compare_digests.sh BUILD CROSS_BUILD EMULATOR...
set -euo pipefail

[[ $# -ge 3 ]] || { echo "usage: compare_digests.sh BUILD CROSS_BUILD EMULATOR..." >&2; exit 2; }
build="$1" cross="$2"
shift 2
for test in "test_kernels --digest 100" "test_math --digest"; do
    read -r -a command <<<"$test"
    here="$("$build/${command[0]}" "${command[@]:1}")"
    there="$("$@" "$cross/${command[0]}" "${command[@]:1}")"
    echo "$test: $here here, $there there"
    [[ "$here" == "$there" ]] || { echo "$test: results differ between $build and $cross" >&2; exit 1; }
done
