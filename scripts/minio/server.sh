# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Sourced by setup_minio.sh: the server as a systemd unit, or as a process with a pid file.
# A process is a pid with its start time, so that a number used again is nobody's server.

unit_text() {
    cat <<TEXT
[Unit]
Description=MinIO, the store of torpor's nodes
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=${server_command[*]}
EnvironmentFile=$root_file
EnvironmentFile=$server_file
User=${minio_user:-root}
Restart=on-failure
RestartSec=2
TimeoutStopSec=$minio_wait
LimitNOFILE=1048576
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
CapabilityBoundingSet=
ReadWritePaths=$data $certs

[Install]
WantedBy=multi-user.target
TEXT
}

start_time_of() { # PID: empty if there is no such process, or only its remains
    local line
    line=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -r -a fields <<<"${line##*) }"
    [[ ${fields[0]} == Z ]] || echo "${fields[19]}"
}

running_pid() { # the pid of the process that the pid file names, if it still runs
    local pid started
    [[ -f $pid_file ]] && read -r pid started <"$pid_file" || return 1
    [[ -n $started && "$(start_time_of "$pid")" == "$started" ]] && echo "$pid"
}

server_runs() {
    if [[ $use_systemd == yes ]]; then
        systemctl --quiet is-active "${minio_unit##*/}"
    else
        running_pid >/dev/null
    fi
}

fingerprint() { # of everything that the running server read when it started
    echo "${server_command[*]} $(cat "$root_file" "$server_file" | sha256sum | cut -d' ' -f1)"
}

start_process() {
    if listens; then
        fail "something else listens on $minio_address already; choose another --address"
    fi
    local root server
    mapfile -t root <"$root_file"
    mapfile -t server <"$server_file"
    # a session of its own: the terminal's Ctrl-C is not meant for it; 9 is this script's lock;
    # no MINIO_* of the caller reaches it, and no secret is in a command line
    (
        cd "$minio_home" && umask 077
        for name in $(compgen -e); do
            [[ $name == PATH ]] || unset "$name"
        done
        export HOME="$minio_home" "${root[@]}" "${server[@]}"
        exec setsid "${server_command[@]}"
    ) </dev/null >>"$log_file" 2>&1 9>&- &
    echo "$! $(start_time_of $!)" >"$pid_file"
}

stop_process() {
    local pid tries
    pid=$(running_pid) || return 0
    kill "$pid"
    for ((tries = minio_wait * 10; tries > 0; tries--)); do
        running_pid >/dev/null || break
        sleep 0.1
    done
    if running_pid >/dev/null; then
        fail "process $pid did not end within $minio_wait seconds; its log is $log_file"
    fi
    rm -f "$pid_file"
}

write_unit() { # true if it was changed
    write_file "$minio_unit" 644 "$(unit_text)" || return 1
    if [[ $dry_run == yes ]]; then
        unit_text >&2
        return
    fi
    systemctl daemon-reload || fail "systemctl daemon-reload failed"
}

restart_server() {
    rm -f "$started_file"
    stop_process # also one that was started before systemd took over
    if [[ $use_systemd == yes ]]; then
        systemctl enable "${minio_unit##*/}" || fail "systemctl enable failed"
        systemctl restart "${minio_unit##*/}" ||
            fail "systemctl restart failed; see journalctl -u ${minio_unit##*/}"
    else
        start_process
    fi
}

listens() {
    (exec 3<>"/dev/tcp/$connect_host/$server_port") 2>/dev/null
}

is_healthy() { # MinIO's own answer to whether it can read and write
    local status
    status=$(
        { exec 3<>"/dev/tcp/$connect_host/$server_port"; } 2>/dev/null || exit 0
        printf 'GET /minio/health/cluster HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' \
            "$server_host:$server_port" >&3
        timeout 5 head -n 1 <&3 || true
    )
    [[ $status == *" 200 "* ]]
}

wait_until_healthy() {
    local end=$((SECONDS + minio_wait))
    until is_healthy; do
        if ! server_runs; then
            if [[ $use_systemd == yes ]]; then
                fail "the server ended; see journalctl -u ${minio_unit##*/}"
            fi
            tail -n 5 "$log_file" >&2
            fail "the server ended; the end of its log $log_file is above"
        fi
        ((SECONDS < end)) || fail "$server_url was not ready within $minio_wait seconds"
        sleep 0.1
    done
}
