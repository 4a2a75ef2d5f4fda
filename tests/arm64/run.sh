#!/usr/bin/env bash
# Runs tests/arm64/check.py on 64-bit Arm: Debian's Python for arm64 under qemu-user, with the aarch64 wheels of what a
# device installs. It needs Debian, no root, and a network the first time; everything lands in build/arm64.
#
# Usage: tests/arm64/run.sh BUNDLE...
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: tests/arm64/run.sh BUNDLE..." >&2; exit 2; }
mapfile -t -d '' bundles < <(realpath -mz -- "$@")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work="$PWD/build/arm64"
root="$work/root"
python="${VENV:-.venv}/bin/python"
requirements="$("$python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")')"

# An apt of our own: this machine's sources, keys and proxies without its hooks, for arm64 beside this machine's own
# architecture. It believes that nothing is installed, so it fetches whatever a package needs.
configure_apt() {
    mkdir -p "$work"/apt/{state/lists,cache/archives}/partial
    touch "$work/apt/status"
    apt-config dump | grep -v -e Invoke -e '^APT::Architecture' >"$work/apt/apt.conf"
    cat >>"$work/apt/apt.conf" <<END
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::State "$work/apt/state";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
APT::Architecture "arm64";
APT::Architectures { "arm64"; "$(dpkg --print-architecture)"; };
APT::Sandbox::User "root";
END
    export APT_CONFIG="$work/apt/apt.conf"
}

# Usage: unpack FOLDER PACKAGE... Keeps /lib a link to /usr/lib, where dpkg-deb -x would make it a folder.
unpack() {
    local folder="$1" package
    shift
    mkdir -p "$folder"/usr/{bin,sbin,lib}
    ln -sfn usr/bin usr/sbin usr/lib "$folder"
    for package; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$folder"
    done
}

fetch() {
    rm -rf "$work"/{apt,qemu,root,site,pycache}
    configure_apt
    local archives="$work/apt/cache/archives"
    apt-get -qq update
    apt-get -qq --yes --download-only --no-install-recommends install python3-minimal libpython3-stdlib libstdc++6
    unpack "$root" "$archives"/*.deb

    # Newer releases have the programs in qemu-user and links to them in qemu-user-static.
    local package
    for package in qemu-user-static qemu-user; do
        (cd "$archives" && apt-get -qq download "$package:$(dpkg --print-architecture)")
        unpack "$work/qemu" "$archives/$package"_*.deb
        [[ ! -x "$work/qemu/usr/bin/qemu-aarch64-static" ]] || break
    done
    find "$work/qemu" -type f ! -name 'qemu-aarch64*' -delete

    # Importing ONNX Runtime crashes unless this file names an Arm processor; which one does not matter.
    mkdir "$root/proc"
    printf '%s\t: %s\n' processor 0 'CPU implementer' 0x41 'CPU part' 0xd08 >"$root/proc/cpuinfo"

    # pip takes each platform by its word: a wheel for an older C library is none for this one.
    local glibc minor platforms=(--platform manylinux2014_aarch64)
    glibc="$(dpkg-deb --field "$archives"/libc6_*_arm64.deb Version)"
    glibc="${glibc%%-*}"
    for ((minor = 17; minor <= ${glibc#2.}; minor++)); do
        platforms+=(--platform "manylinux_2_${minor}_aarch64")
    done
    "$python" -m pip --disable-pip-version-check install --quiet --target "$work/site" \
        --only-binary=:all: "${platforms[@]}" --python-version "$(readlink "$root/usr/bin/python3" | tr -d a-z)" \
        --constraint constraints.txt --requirement /dev/stdin <<<"$requirements"
    rm -rf "$work/apt"
}

# Written last: without it, or with another content, everything is fetched anew.
stamp="$(cat tests/arm64/run.sh constraints.txt - <<<"$requirements" | sha256sum)"
if [[ "$(cat "$work/.fetched" 2>/dev/null)" != "$stamp" ]]; then
    rm -f "$work/.fetched"
    fetch
    echo "$stamp" >"$work/.fetched"
fi

# Two sets of kernels: a Raspberry Pi 4 has no dot-product instructions; a Raspberry Pi 5 and a Jetson Orin have them.
export PYTHONPATH="$work/site:runtimes:sdk" PYTHONPYCACHEPREFIX="$work/pycache"
for processor in cortex-a72 cortex-a76; do
    echo "=== $processor"
    "$work/qemu/usr/bin/qemu-aarch64-static" -cpu "$processor" -L "$root" \
        "$root/usr/bin/python3" -su tests/arm64/check.py "${bundles[@]}"
done
