#!/bin/sh
# needed.sh PROGRAM...: the Debian packages of the shared libraries that the programs name.
set -eu
folder="/$(gcc -print-multiarch)/"
for library in $(objdump -p "$@" | awk '$1 == "NEEDED" { print $2 }' | sort -u); do
    dpkg-query -S "*$folder*$library" | grep "/$library\$" | head -n 1 | cut -d : -f 1
done | sort -u
