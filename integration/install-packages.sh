#!/bin/bash
# Installs the clients that the integration tests talk to platter with.
#
# It does nothing when all of them are there. QEMU comes from the backports of
# the running Debian release when they can be had (its io_uring, NBD and qcow2
# code is what platter is compared with), else from the release itself.
set -euo pipefail

# program or file:package
wanted=(
	make:make
	gcc:gcc # for the race detector, as are the headers
	/usr/include/stdlib.h:libc6-dev
	qemu-img:qemu-utils
	qemu-nbd:qemu-utils
	qemu-io:qemu-utils
	qemu-storage-daemon:qemu-system-common
	nbdkit:nbdkit
	nbdinfo:libnbd-bin
	nbdcopy:libnbd-bin
	/usr/lib/python3/dist-packages/nbd.py:python3-libnbd
	/usr/bin/python3:python3
	fio:fio
	strace:strace
	jq:jq
	setpriv:util-linux
)

missing_packages() {
	local entry
	for entry in "${wanted[@]}"; do
		# command -v knows programs by name, and by path when executable.
		command -v "${entry%%:*}" >/dev/null || [[ -e ${entry%%:*} ]] || echo "${entry##*:}"
	done | sort -u
}

mapfile -t missing < <(missing_packages)
if ((${#missing[@]} == 0)); then
	exit 0
fi
if ((EUID != 0)); then
	echo "install-packages: missing packages: ${missing[*]}" >&2
	echo "install-packages: run 'make deps' as root, or install them by hand" >&2
	exit 1
fi
if ! command -v apt-get >/dev/null; then
	echo "install-packages: there is no apt-get here; install by hand: ${missing[*]}" >&2
	exit 1
fi

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -q -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120)

retry() {
	local attempt
	for attempt in 1 2 3; do
		"$@" && return 0
		sleep $((attempt * 3))
	done
	return 1
}

# add_backports writes a source for the release's backports with the mirror and
# the key of the machine's own entry. Backports rank below the release, so only
# packages that are asked for by suite come from there.
add_backports() {
	local suite=$1 file=/etc/apt/sources.list.d/platter-backports
	if [[ -r /etc/apt/sources.list.d/debian.sources ]]; then
		# Keep the first stanza of the main archive, with its suites exchanged.
		awk -v RS= -v suite="$suite" '
			/(^|\n)Suites:[^\n]*-security/ { next }
			{ gsub(/(^|\n)#[^\n]*/, ""); sub(/Suites:[^\n]*/, "Suites: " suite); sub(/^\n/, ""); print; exit }
		' /etc/apt/sources.list.d/debian.sources >"$file.sources"
	elif [[ -r /etc/apt/sources.list ]]; then
		sed -nE "s#^(deb( \[[^]]*\])? [^ ]+) ${suite%-backports} .*#\1 $suite main#p" \
			/etc/apt/sources.list | head -n 1 >"$file.list"
	fi
}

drop_backports() {
	rm -f /etc/apt/sources.list.d/platter-backports.{sources,list}
}

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
backports=$codename-backports
if [[ $codename == bookworm ]]; then
	add_backports "$backports"
fi
retry "${apt[@]}" update || echo "install-packages: some package lists could not be had" >&2
from_backports=no
if [[ $(apt-cache madison qemu-utils) == *"$backports/"* ]]; then
	from_backports=yes
else
	echo "install-packages: no $backports to be had, taking the release's packages" >&2
	drop_backports
fi

qemu=() others=()
for package in "${missing[@]}"; do
	if [[ $package == qemu-* ]]; then
		qemu+=("$package")
	else
		others+=("$package")
	fi
done
if ((${#others[@]} > 0)); then
	retry "${apt[@]}" install --no-install-recommends "${others[@]}"
fi
if ((${#qemu[@]} > 0)); then
	if [[ $from_backports != yes ]] ||
		! retry "${apt[@]}" install --no-install-recommends -t "$backports" "${qemu[@]}"; then
		retry "${apt[@]}" install --no-install-recommends "${qemu[@]}"
	fi
fi

mapfile -t missing < <(missing_packages)
if ((${#missing[@]} > 0)); then
	echo "install-packages: still missing after the install: ${missing[*]}" >&2
	exit 1
fi
