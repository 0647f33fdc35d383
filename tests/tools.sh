#!/bin/sh
# Installs the Debian packages whose programs the tests run, where that is possible: as root, with apt-get.
# Elsewhere it says which tests will be skipped. With CI=true a missing program is a failure: nothing may be skipped.
# WANTED: the programs, by default all that the tests use.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in ${WANTED:-nginx prometheus promtool redis-server}; do
    command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    packages=$(for program in $missing; do [ "$program" = promtool ] && echo prometheus || echo "$program"; done | sort -u)
    echo "installing for the tests:" $packages
    # The packages' own services must not be started: the tests start what they need on free ports.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    if apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null; then
        missing=""
    fi
fi
[ -n "$missing" ] || exit 0

for program in $missing; do
    echo "NOT TESTED: $program is not installed; the tests that run it are skipped." >&2
done
if [ "${CI:-}" = true ]; then
    echo "CI=true allows no skipped tests." >&2
    exit 1
fi
