#!/bin/sh
# A Sentinel's start in lab/docker-compose.cluster.yml. It keeps what it knows in its file, on a volume of its own.
#
# Clients log in without a name and with the password of Redis's user demo, and may ask for the master, no more.
# OPTIONS   more lines for the file: see lab/docker-compose.cluster.tls.yml
set -eu

until [ -s /run/admin/password ] && [ -s /run/admin/demo ]; do sleep 0.2; done
password=$(cat /run/admin/password)
conf=/data/sentinel.conf
known=$(grep -E "^sentinel (myid|monitor|config-epoch|leader-epoch|current-epoch|known-)" "$conf" 2>/dev/null || :)
rm -f "$conf"
(umask 077 && cat >"$conf") <<END
port 26379
dir /data
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $(hostname)
user default on #$(cat /run/admin/demo) -@all +auth +hello +ping +client|setinfo +client|setname +sentinel|masters +sentinel|master +sentinel|get-master-addr-by-name +sentinel|replicas +sentinel|ckquorum
user admin on #$(printf %s "$password" | sha256sum | cut -d " " -f 1) allchannels +@all
sentinel sentinel-user admin
sentinel sentinel-pass $password
$(echo "$known" | grep "^sentinel monitor " || echo "sentinel monitor mymaster redis 6379 2")
sentinel auth-user mymaster admin
sentinel auth-pass mymaster $password
sentinel down-after-milliseconds mymaster 3000
sentinel failover-timeout mymaster 10000
$(echo "$known" | grep -v "^sentinel monitor " || :)
${OPTIONS:-}
END
exec docker-entrypoint.sh redis-server "$conf" --sentinel
