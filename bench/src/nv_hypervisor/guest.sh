#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# The guest's end of `cargo xtask bench nv-hypervisor`: PostgreSQL on the vSSD, and a load on it.
#
#   guest.sh load SCALE      makes the file system, the database and pgbench's tables; ends when all is written back
#   guest.sh run [warm]      serves, keeps a ledger and applies the load until the power goes; `warm`: the tables are read first
#
# What it has to say goes, a line at a time, to the port `news`, where the host notes the time:
#
#   S WORD      a step is done: mounted, serving, warm, loaded
#   J N         the ledger's update to N was acknowledged
#   P LINE      what pgbench prints
#   E TEXT      something went wrong
export PATH=/usr/lib/postgresql/15/bin:/tools:/usr/sbin:/usr/bin:/sbin:/bin
export TZ=GMT PGHOST=/tmp PGUSER=postgres PGDATABASE=postgres
DATA=/data/postgres

# Only one may have the port open; all others inherit it.
for dir in /sys/class/virtio-ports/*; do
    if test "$(cat "$dir/name")" = news; then
        exec 9> "/dev/${dir##*/}"
    fi
done

say() {
    echo "$*" >&9
}

fail() {
    say "E $*: $(tail -n 3 /tmp/postgres.log 2>/dev/null | tr '\n' ' ')"
    exit 1
}

as() {
    su postgres -s /bin/sh -c "$*"
}

serve() {
    as "exec postgres -D $DATA -k /tmp -c listen_addresses= $*" </dev/null >/tmp/postgres.log 2>&1 &
    until as "psql -qAtX -c 'select 1'" </dev/null >/dev/null 2>&1; do
        kill -0 $! 2>/dev/null || fail "postgres has ended"
        sleep 0.1
    done
}

# What the cut may have torn ends here.
say
grep -q ^postgres: /etc/passwd || echo 'postgres:x:70:70::/data:/bin/sh' >> /etc/passwd
/tools/modprobe ext4
mkdir -p /data

case $1 in
load)
    mkfs.ext4 -q -F /dev/vda || fail "mkfs.ext4"
    mount -t ext4 /dev/vda /data || fail "mount"
    mkdir $DATA && chown 70:70 $DATA && chmod 700 $DATA
    as "initdb -D $DATA -A trust --locale=C -E UTF8 -N" >/tmp/postgres.log 2>&1 || fail "initdb"
    # The library that compiles queries is not in the image.
    echo "shared_buffers = 400MB
jit = off
autovacuum = off" >> $DATA/postgresql.conf
    serve -c fsync=off -c wal_level=minimal -c max_wal_senders=0 -c max_wal_size=256MB
    as "pgbench -i -q -s $2" >/tmp/pgbench.log 2>&1 || fail "pgbench: $(tail -n 1 /tmp/pgbench.log)"
    as "psql -qAtX -c 'create table ledger (n bigint not null)' -c 'insert into ledger values (0)' \
        -c 'create extension pg_prewarm'" >/tmp/psql.log 2>&1 || fail "psql: $(tail -n 1 /tmp/psql.log)"
    as "pg_ctl stop -w -t 300 -m fast -D $DATA" >/dev/null 2>&1 || fail "pg_ctl stop"
    umount /data || fail "umount"
    say "S loaded"
    ;;
run)
    mount -t ext4 /dev/vda /data || fail "mount"
    say "S mounted"
    # Of the life that was cut: its process number may be another's of the same user by now.
    rm -f $DATA/postmaster.pid
    serve
    say "S serving"
    # Some twenty updates a second: enough to see when the database answers, too few to be a load.
    while sleep 0.05; do
        echo 'update ledger set n = n + 1 returning n;'
    done | as "psql -qAtX" 2>/dev/null | while read -r n; do
        say "J $n"
    done &
    if test "$2" = warm; then
        for table in pgbench_accounts pgbench_accounts_pkey; do
            as "psql -qAtX -c \"select pg_prewarm('$table')\"" </dev/null >/dev/null 2>&1 || fail "pg_prewarm"
        done
        say "S warm"
    fi
    as "pgbench -n -M prepared -c 4 -j 2 -T 86400 -P 1 -b select-only@9 -b simple-update@1" </dev/null 2>&1 |
        while read -r line; do
            say "P $line"
        done
    fail "pgbench has ended"
    ;;
esac
