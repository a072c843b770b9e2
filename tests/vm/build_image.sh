#!/usr/bin/env bash
# Makes the machine's disk, kernel and initial RAM disk in the directory that is its only argument. Runs as root on Debian;
# needs mmdebstrap and e2fsprogs. image.py calls it, once for each version of this file and of agent.py.
#
# Nothing of bsup is in the image: a second drive with the label `bsup` holds it, so that a change of the code makes no new one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
root=$out/root

# What bsup's tests need of a host: PostgreSQL, Docker (busybox-static becomes its images), git for checkouts, and what their
# commands call. dbus is for Docker's systemd cgroup driver.
packages=systemd,systemd-sysv,dbus,udev,kmod,linux-image-cloud-amd64,initramfs-tools
packages+=,postgresql-15,docker.io,python3,git,ca-certificates,busybox-static,iproute2,iptables,procps,psmisc,curl

before() {
    mkdir -p "$1/etc/postgresql-common"
    echo "initdb_options = '--locale=C.UTF-8 --encoding=UTF8'" >"$1/etc/postgresql-common/createcluster.conf"
}

# All that the kernel needs to find the disk. Debian's own takes four seconds more at each boot.
initrd() {
    local tree=$1/tmp/initrd module
    mkdir -p "$tree"/{bin,dev,root,modules}
    cp "$1/bin/busybox" "$tree/bin/"
    {
        echo '#!/bin/busybox sh'
        echo 'busybox mount -t devtmpfs dev /dev'
        chroot "$1" modprobe -a --show-depends -S "$(ls "$1/lib/modules")" virtio_pci virtio_blk |
            awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
            cp "$1$module" "$tree/modules/"
            echo "busybox insmod /modules/${module##*/}"
        done
        echo 'until busybox test -b /dev/vda; do busybox usleep 10000; done'
        echo 'busybox mount -t ext4 /dev/vda /root'
        echo 'busybox mount --move /dev /root/dev'
        echo 'exec busybox switch_root /root /sbin/init'
    } >"$tree/init"
    chmod 755 "$tree/init"
    chroot "$1" sh -c 'cd /tmp/initrd && find . | cpio --quiet -o -H newc'
    rm -rf "$tree"
}

after() {
    local unit
    install -m 755 "$here/agent.py" "$1/usr/local/sbin/machine-agent"
    cat >"$1/etc/systemd/system/machine-agent.service" <<'UNIT'
[Unit]
Description=Runs the commands that the tests send
After=basic.target

[Service]
Type=notify
ExecStart=/usr/bin/python3 -I -S /usr/local/sbin/machine-agent
Delegate=yes
OOMScoreAdjust=-1000
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT
    printf '#!/bin/sh\nexec /usr/bin/python3 -m supervisor "$@"\n' >"$1/usr/local/bin/bsup"
    chmod 755 "$1/usr/local/bin/bsup"
    echo /opt/bsup >"$1/usr/lib/python3/dist-packages/bsup.pth"
    mkdir -p "$1/opt/bsup"
    cat >"$1/etc/fstab" <<'FSTAB'
/dev/vda /         ext4 defaults,errors=panic 0 1
LABEL=bsup /opt/bsup ext4 ro,nofail 0 0
FSTAB
    echo vm >"$1/etc/hostname"
    : >"$1/etc/machine-id"

    # Whoever reaches the server is a test.
    printf 'local all all trust\nhost all all 127.0.0.1/32 trust\nhost all all 10.0.2.0/24 trust\n' \
        >"$1/etc/postgresql/15/main/pg_hba.conf"
    printf "listen_addresses = '*'\njit = off\n" >>"$1/etc/postgresql/15/main/postgresql.conf"

    # The server itself instead of Debian's Perl around it, which takes ten seconds, and which after a power cut takes any
    # process that has the old server's pid for the server.
    mkdir -p "$1/etc/systemd/system/postgresql@15-main.service.d" "$1/etc/systemd/system/systemd-udev-trigger.service.d"
    cat >"$1/etc/systemd/system/postgresql@15-main.service.d/machine.conf" <<'UNIT'
[Service]
Type=notify
User=postgres
PIDFile=
ExecStart=
ExecStart=/usr/lib/postgresql/15/bin/postgres -c config_file=/etc/postgresql/15/main/postgresql.conf
ExecStop=
ExecReload=
ExecReload=/bin/kill -HUP $MAINPID
KillMode=mixed
KillSignal=SIGINT
UNIT
    # Only what the machine has is looked at.
    cat >"$1/etc/systemd/system/systemd-udev-trigger.service.d/machine.conf" <<'UNIT'
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=virtio --subsystem-match=virtio-ports \
    --subsystem-match=block --subsystem-match=net --subsystem-match=rtc
UNIT

    # What a test wants of these it starts.
    for unit in postgresql.service docker.service containerd.service; do
        chroot "$1" systemctl --quiet disable "$unit"
    done
    for unit in getty@tty1.service serial-getty@ttyS0.service systemd-logind.service systemd-update-utmp.service \
        apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
        fstrim.timer systemd-binfmt.service systemd-pstore.service modprobe@.service \
        dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount; do
        ln -sf /dev/null "$1/etc/systemd/system/$unit"
    done
    chroot "$1" systemctl --quiet enable machine-agent.service
    initrd "$1" >"$out/initrd"
}

case ${2:-all} in
    before) before "$3" ;;
    after) after "$3" ;;
    all)
        # PostgreSQL's just-in-time compiler alone is 180 MB.
        INITRD=No mmdebstrap --mode=root --variant=minbase --quiet --include="$packages" \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/lib/postgresql/15/lib/bitcode/*' \
            --dpkgopt='path-exclude=/usr/lib/postgresql/15/lib/llvmjit*' --dpkgopt='path-exclude=/usr/lib/*/libLLVM*' \
            --dpkgopt='path-exclude=/usr/lib/*/libz3*' \
            --setup-hook="'$0' '$out' before \"\$1\"" --customize-hook="'$0' '$out' after \"\$1\"" \
            bookworm "$root" "${BSUP_VM_MIRROR:-http://deb.debian.org/debian}"
        cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
        mke2fs -q -t ext4 -d "$root" -L root "$out/disk" 8G
        rm -rf "$root"
        ;;
esac
