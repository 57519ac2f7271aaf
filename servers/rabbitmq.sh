#!/bin/sh
# RabbitMQ's start where its image's own does not do: a password in a file, and one Erlang cookie for a whole cluster.
#
# /run/secrets/rabbitmq_password   if it is there, the password of RABBITMQ_DEFAULT_USER
# /run/cookie                      a volume of all nodes, for the cookie; the first start makes it
# SEED                             the node that makes user and virtual host. The others join the oldest one, so those
#                                  without data start after it
set -eu

secret=/run/secrets/rabbitmq_password
if [ -e "$secret" ]; then
  RABBITMQ_DEFAULT_PASS=$(tr -d "\r" <"$secret")
  [ -n "$RABBITMQ_DEFAULT_PASS" ] || { echo "the file rabbitmq_password is empty"; exit 1; }
  export RABBITMQ_DEFAULT_PASS
fi

if [ -d /run/cookie ]; then
  umask 077
  if [ ! -e /run/cookie/cookie ]; then # of several first starts, one makes it
    head -c 32 /dev/urandom | sha256sum | cut -d " " -f 1 >"/run/cookie/$(hostname)"
    ln "/run/cookie/$(hostname)" /run/cookie/cookie 2>/dev/null || :
    rm "/run/cookie/$(hostname)"
  fi
  rm -f /var/lib/rabbitmq/.erlang.cookie
  (umask 377 && cat /run/cookie/cookie >/var/lib/rabbitmq/.erlang.cookie) # its owner alone may read it, else Erlang stops
  umask 022
fi

if [ -n "${SEED:-}" ] && [ -z "$(ls -A /var/lib/rabbitmq/mnesia 2>/dev/null)" ]; then
  until bash -c "exec 3<>/dev/tcp/$SEED/25672" 2>/dev/null; do sleep 0.5; done
fi

exec docker-entrypoint.sh rabbitmq-server
