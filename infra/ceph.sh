#!/bin/bash
# A real S3 server for tests: one Ceph monitor, one OSD and the RADOS gateway, as root, without systemd, on 127.0.0.1 alone.
# Debian: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common   (286 MB with their dependencies)
#
#   ceph.sh start DIR [PORT]   returns when S3 answers at http://127.0.0.1:PORT (7480), after 15 to 30 s;
#                              prints the access key and the secret key that it made, one a line
#   ceph.sh stop DIR           stops what start started, and removes DIR
set -euo pipefail

usage() {
  sed -n '5,7s/^# *//p' "$0" >&2
  exit 2
}

[ $# -ge 2 ] || usage
action=$1
dir=$(realpath -m "$2")
port=${3:-7480}

stop() {
  local pid_file pid
  for pid_file in "$dir"/run/{client.rgw,osd.0,mon.a}.pid; do
    [ -f "$pid_file" ] || continue
    pid=$(cat "$pid_file")
    # The number may be another process' by now.
    grep -qaE '^(radosgw|ceph-(osd|mon))' "/proc/$pid/cmdline" 2>/dev/null || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
  [ ! -f "$dir/ceph.conf" ] || rm -rf "$dir"
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  if [ -e "$dir/ceph.conf" ]; then
    echo "$dir is in use: ceph.sh stop $dir" >&2
    exit 1
  fi
  mkdir -p "$dir"/{run,mon,osd,log}
  # What fails half way leaves nothing running.
  trap 'tail -n 5 "$dir"/log/*.log >&2 2>/dev/null || true; stop' ERR INT TERM
  local fsid osd_uuid access secret msgr2 msgr1 conf=$dir/ceph.conf keys=$dir/keyring
  fsid=$(cat /proc/sys/kernel/random/uuid)
  osd_uuid=$(cat /proc/sys/kernel/random/uuid)
  access=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
  secret=$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')
  msgr2=$(free_port)
  msgr1=$(free_port)
  cat > "$conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$msgr2,v1:127.0.0.1:$msgr1]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
# With auth none the gateway hangs.
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail warn = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
run dir = $dir/run
admin socket = $dir/run/\$cluster-\$name.\$pid.asok
pid file = $dir/run/\$name.pid
log file = $dir/log/\$name.log
mon data = $dir/mon
osd data = $dir/osd
osd objectstore = bluestore
bluestore block size = 21474836480
bluestore block create = true
osd memory target = 1073741824
keyring = $keys
[mon.a]
mon addr = 127.0.0.1
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 64
rgw enable usage log = false
rgw enable ops log = false
rgw dns name = localhost
CONF
  export CEPH_CONF=$conf
  ( umask 077
    ceph-authtool --create-keyring "$keys" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$keys" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' --cap mds 'allow *'
    ceph-authtool "$keys" --gen-key -n client.rgw --cap mon 'allow rwx' --cap osd 'allow rwx'
    ceph-authtool "$keys" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
  ) >/dev/null
  monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$msgr2,v1:127.0.0.1:$msgr1]" "$dir/monmap" >/dev/null
  ceph-mon -i a --mkfs --monmap "$dir/monmap" --keyring "$keys" -c "$conf"
  # Daemons must not hold the caller's pipes.
  ceph-mon -i a -c "$conf" </dev/null >>"$dir/log/start.log" 2>&1
  local ceph=(timeout 60 ceph -c "$conf")
  "${ceph[@]}" auth import -i "$keys" >/dev/null 2>&1
  "${ceph[@]}" osd new "$osd_uuid" >/dev/null
  "${ceph[@]}" config set mon auth_allow_insecure_global_id_reclaim false >/dev/null 2>&1
  ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid" -c "$conf" >>"$dir/log/start.log" 2>&1
  ceph-osd -i 0 -c "$conf" </dev/null >>"$dir/log/start.log" 2>&1
  wait_for 60 sh -c "timeout 60 ceph -c '$conf' osd stat 2>/dev/null | grep -q '1 up'"
  timeout 120 radosgw -n client.rgw -c "$conf" </dev/null >>"$dir/log/start.log" 2>&1
  wait_for 60 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port" 2>/dev/null
  radosgw-admin -c "$conf" -n client.rgw user create --uid=functok --display-name=functok \
    --access-key="$access" --secret-key="$secret" >/dev/null 2>>"$dir/log/start.log"
  trap - ERR INT TERM
  printf '%s\n%s\n' "$access" "$secret"
}

wait_for() {
  local seconds=$1
  shift
  for _ in $(seq $((seconds * 2))); do
    "$@" && return 0
    sleep 0.5
  done
  echo "gave up after $seconds s: $*" >&2
  return 1
}

case $action in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
