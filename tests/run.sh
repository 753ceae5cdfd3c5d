#!/usr/bin/env bash
# Installs what is missing, builds with warnings as errors, and runs every test:
#   1. debug: ASan, UBSan, fault injection, fuzz corpus replay, bench smoke, tidy
#   2. release: the same tests at full speed, and the programs end to end
#   3. arm64: kernels and engine cross-built, run under qemu-user as a Cortex-A72 and a Cortex-A76,
#      without the tests labelled `host`, which prove nothing more there; what depends on the choice
#      of kernels also as a Cortex-A53 and as `max`, which has i8mm and bf16
# Conformance tests use the folder FLEETUNE_DATA (default: ../shared/data beside the checkout) when
# it is there, and say that they were skipped when it is not.
#
#   tests/run.sh            everything
#   tests/run.sh debug      one part: debug, release or arm64
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/packages.sh
. deploy/packages.sh
parts="${1:-debug release arm64}"

# shellcheck disable=SC2086
install_packages $packages_build $packages_test

# The real model, for conformance and end-to-end tests; without it they say that they are skipped.
# shellcheck source=deploy/model.sh
. deploy/model.sh
if model="$(fetch_model)"; then
    export FLEETUNE_MODEL="$model" FLEETUNE_SMOLLM2="$model"
else
    echo "the real model is not to be had here: the tests that need it are skipped"
fi

run_part() {
    echo "== $1"
    cmake --preset "$1" >/dev/null
    cmake --build --preset "$1" -- -k 0
    shift
    "$@"
}

kernel_tests='^test_(packed|gemm_packed|gemm_f32|attention|elementwise|guard_pages|forward|generate|gradients|luc_quantise)$|^bench_repeat'
export CTEST_OUTPUT_ON_FAILURE=1 CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-2}"
for part in $parts; do
    case "$part" in
    debug) run_part debug env -u FLEETUNE_SMOLLM2 ctest --preset debug -LE e2e ;;
    release) run_part release env FL_TEST_LONG=1 FLEETUNE_POINTS=3000 ctest --preset release ;;
    arm64)
        run_part arm64 env -u FLEETUNE_SMOLLM2 QEMU_CPU=cortex-a72 ctest --preset arm64 -LE host
        env -u FLEETUNE_SMOLLM2 QEMU_CPU=cortex-a76 ctest --preset arm64 -LE host
        for core in cortex-a53 max; do
            QEMU_CPU=$core ctest --preset arm64 --no-tests=error -R "$kernel_tests"
        done
        ;;
    *)
        echo "usage: tests/run.sh [debug|release|arm64]" >&2
        exit 2
        ;;
    esac
done
echo "all parts passed: $parts"
