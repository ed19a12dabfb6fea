#!/usr/bin/env bash
# All tests, on every software GPU stack; installs the stacks first (Debian and Ubuntu). Every part runs whatever the
# others do, and the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never} CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0}
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$logs"' EXIT
report=$logs/report

# Runs one part: its time and its tests go into the report. part NAME CMD...
part() {
  local name=$1 begin=$SECONDS tests_passed=0 tests_failed=0 line status log
  log=$(mktemp -p "$logs")
  shift
  printf '\n==> %s\n' "$name"
  "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  # cargo's `test result: ok. 3 passed; 0 failed; ..` and conformance's `3 passed, 0 failed, 0 skipped`.
  while read -r line; do
    [[ $line =~ ([0-9]+)\ passed[\;,]\ ([0-9]+)\ failed ]] || continue
    tests_passed=$((tests_passed + BASH_REMATCH[1])) tests_failed=$((tests_failed + BASH_REMATCH[2]))
  done < <(grep -E '^(test result: |[0-9]+ passed, )' "$log")
  # A part without tests counts as one, and so does one that stops before its tests fail.
  if ((status != 0 && tests_failed == 0)); then
    tests_failed=1
  elif ((tests_passed + tests_failed == 0)); then
    tests_passed=1
  fi
  printf '%-32s %4d s %5d passed %4d failed\n' "$name" $((SECONDS - begin)) "$tests_passed" "$tests_failed" >>"$report"
}

# Tests that need no adapter run once; the others are those that use the shared list of devices.
tests_on() {
  local stack=$1 file targets=()
  if [[ $stack == cpu ]]; then
    tests/stacks.sh run cpu cargo test --no-fail-fast
    return
  fi
  while read -r file; do
    # The example runs the same table of checks in release, on the same adapters.
    [[ $file == conformance ]] || targets+=(--test "$file")
  done < <(grep -l '^mod support;' tests/*.rs | sed 's,.*/,,; s,\.rs$,,')
  tests/stacks.sh run "$stack" cargo test --no-fail-fast "${targets[@]}"
}

documentation() { RUSTDOCFLAGS='-D warnings' cargo doc --no-deps; }

tools() {
  cargo fmt --version && cargo clippy --version && return
  rustup component add rustfmt clippy
}

# Without these nothing else has a meaning.
tests/stacks.sh install || exit 1
tools || exit 1
target=$(cargo metadata --format-version 1 --no-deps | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
examples=${target:-target}/release/examples

part 'formatting' cargo fmt --check
part 'clippy' cargo clippy --all-targets -- -D warnings
part 'clippy without default features' cargo clippy --no-default-features --all-targets -- -D warnings
part 'documentation' documentation
part 'examples build' cargo build --release --examples
part 'tests, cpu' tests_on cpu

conformance() {
  part "conformance, $1" tests/stacks.sh run "$1" "$examples/conformance"
  part "golden vectors, $1" tests/stacks.sh run "$1" "$examples/conformance" --golden tests/golden
  part "golden vectors, peer, $1" tests/stacks.sh run "$1" "$examples/conformance" --golden tests/golden/peer
}
training() {
  part "attention, $1" tests/stacks.sh run "$1" "$examples/attention"
  part "train_step, $1" tests/stacks.sh run "$1" "$examples/train_step" --steps 3
}

# A software driver compiles on one core, lavapipe longest, so two of them run at a time.
beside() {
  conformance lavapipe
  local stack
  for stack in swiftshader gl; do
    part "tests, $stack" tests_on "$stack"
    conformance "$stack"
  done
  # Attention's kernels for devices that do not tell how they hold their matrices.
  part 'attention without components' env LIGHTHOUSE_COMPONENTS=off LIGHTHOUSE_TIER=coop8 \
    tests/stacks.sh run lavapipe cargo test --no-fail-fast --test flash
  conformance cpu
  training cpu
}
beside >"$logs/beside" 2>&1 &
beside=$!
part 'tests, lavapipe' tests_on lavapipe
training lavapipe
wait "$beside" || printf '%-32s %4d s %5d passed %4d failed\n' 'the stacks beside lavapipe' 0 0 1 >>"$report"
cat "$logs/beside"

printf '\n'
cat "$report"
read -r passed failed < <(awk '{ p += $(NF - 3); f += $(NF - 1) } END { print p, f }' "$report")
printf 'all parts: %d s\n%d passed, %d failed\n' "$SECONDS" "$passed" "$failed"
((passed > 0 && failed == 0))
