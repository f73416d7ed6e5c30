#!/bin/bash
# Run a sweep, stop it in order when a file appears: drive.sh DRAIN_FILE STATUS_FILE COMMAND...
#
# The batch script is told about the end of the wall time on one node, the driver may run on another,
# and between them lies a step whose processes a signal would all reach: hence a file.
set -uo pipefail
drain=$1 ended=$2
shift 2

"$@" &
driver=$!
(
  until [[ -e $drain ]]; do sleep 1; done
  kill -TERM "$driver" 2>/dev/null
) &
watcher=$!
wait "$driver"
status=$?
kill "$watcher" 2>/dev/null
echo "$status" >"$ended"
exit "$status"
