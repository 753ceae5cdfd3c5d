# Sourced by deploy/demo.sh and tests/run.sh: installs what is missing, on Debian 12 and 13 and on
# Raspberry Pi OS, and says so. Nothing is installed that is already there.

packages_build="gcc libc6-dev cmake ninja-build pkg-config libzmq3-dev libprotobuf-c-dev
 protobuf-c-compiler protobuf-compiler libsodium-dev libsqlite3-dev libinih-dev
 libjansson-dev libqrencode-dev"
packages_test="libcmocka-dev python3 python3-pip gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
 tcpdump iproute2 nftables strace"

# install_packages NAME...: apt-get for those that dpkg does not have. Uses sudo when not root.
install_packages() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "these packages are missing and this user may not install them:$missing" >&2
            return 1
        }
        sudo=sudo
    fi
    echo "installing:$missing"
    $sudo apt-get update -qq || return 1
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        $missing >/dev/null
}
