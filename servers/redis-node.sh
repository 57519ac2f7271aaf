#!/bin/sh
# Redis's start in lab/docker-compose.cluster.yml, in front of redis.sh: one of three, of which Sentinel makes one the
# master. Sentinel notes in /data/redis.conf who is (CONFIG REWRITE), so that a restart of all begins with the newest data.
#
# MASTER   whom an empty node follows; without it, the node is the first master
set -eu

admin=/run/admin/password
if [ -z "${MASTER:-}" ]; then
  [ -s "$admin" ] || head -c 32 /dev/urandom | sha256sum | cut -d " " -f 1 >"$admin"
fi
until [ -s "$admin" ] && { [ -z "${MASTER:-}" ] || [ -s /run/admin/demo ]; }; do sleep 0.2; done

export CONFIG=/data/redis.conf
role=${MASTER:+replicaof $MASTER 6379}
[ ! -e "$CONFIG" ] || role=$(grep "^replicaof " "$CONFIG" || :)
rm -f "$CONFIG"
# min-replicas: a master that is cut off from both replicas takes no results, which it would lose as soon as it is back.
(umask 077 && cat >"$CONFIG") <<END
$role
masteruser admin
masterauth $(cat "$admin")
replica-announce-ip $(hostname)
min-replicas-to-write 1
min-replicas-max-lag 5
END
exec sh /start.sh
