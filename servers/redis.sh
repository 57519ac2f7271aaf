#!/bin/sh
# Redis's start in docker-compose.yml: two users, and nobody else.
#
# demo may do what a result backend does with its own keys (global_keyprefix) and channels. admin, for the lab and the
# tests, has a random password, which the first start makes. default is off; without its rights, Redis would drop
# transactions, those of chords, when it reads its file after a restart. Redis gets hashes of the passwords.
#
# appendonly: results survive a restart. noeviction: a full Redis keeps what it has and refuses new results, whose
# workers then wait: leave room for all results of result_expires. The tests take many databases.
#
# DEMO_PASSWORD   demo's password; when empty, /run/secrets/redis_password has it
# CONFIG, MASTER  in a cluster: see redis-node.sh
# OPTIONS         more of redis-server's options: see lab/docker-compose.tls.yml
set -eu

hash() { printf %s "$1" | sha256sum | cut -d " " -f 1; }

umask 022
admin=/run/admin/password
[ -s "$admin" ] || head -c 32 /dev/urandom | sha256sum | cut -d " " -f 1 >"$admin"
if [ -z "${MASTER:-}" ]; then # a replica takes what its master has left there
  password=${DEMO_PASSWORD:-$(tr -d "\r" </run/secrets/redis_password)}
  [ -n "$password" ] || { echo "the file redis_password is empty"; exit 1; }
  hash "$password" >/run/admin/demo
fi

connections="+ping +select +client|setinfo +wait"
results="+get +getrange +mget +set +setex +del +expire +ttl +multi +exec +evalsha +script|load"
announcements="+publish +subscribe +unsubscribe"
chords="+incrby +exists +rpush +llen +lrange +zadd +zcount +zrange +sadd +sismember"

# shellcheck disable=SC2086 # these are several words each
exec docker-entrypoint.sh redis-server ${CONFIG:-} --appendonly yes --maxmemory 256mb --maxmemory-policy noeviction --databases 64 \
  --user default off "~*" "&*" +@all \
  --user admin on "#$(hash "$(cat "$admin")")" "~*" "&*" +@all \
  --user demo on "#$(cat /run/admin/demo)" "~celery-demo:*" "&celery-demo:*" -@all \
  $connections $results $announcements $chords ${OPTIONS:-}
