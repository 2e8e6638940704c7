# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Sourced by setup_minio.sh: the mode local, one MinIO on this machine.

use_local_paths() {
    state=$minio_home
    data=${minio_data:-$minio_home/data}
    certs=$minio_home/certs
    pid_file=$minio_home/minio.pid
    log_file=$minio_home/minio.log
    started_file=$minio_home/minio.started
    server_file=$minio_home/server.env
    server_host=${minio_address%:*}
    server_port=${minio_address##*:}
    case $server_host in "" | 0.0.0.0 | "[::]") server_host=127.0.0.1 ;; esac
    server_url=http://$server_host:$server_port
    connect_host=${server_host#[}
    connect_host=${connect_host%]}
    use_systemd=$minio_systemd
    if [[ $use_systemd == auto ]]; then
        [[ -d /run/systemd/system ]] && use_systemd=yes || use_systemd=no
    fi
}

check_programs() {
    step="programs"
    local program
    for program in "$minio" "$mc"; do
        [[ -x $program ]] || fail "$program is no program; scripts/install-minio builds it"
    done
    if [[ $use_systemd == no && -n $minio_user && $minio_user != "$(id -un)" ]]; then
        fail "without systemd the server runs as you, not as $minio_user; leave --user out"
    fi
}

write_server_files() {
    step="server files"
    make_directory "$data" 700
    make_directory "$certs" 700
    local browser=off
    [[ -n $minio_console_address ]] && browser=on
    write_file "$server_file" 600 "MINIO_REGION=$minio_region
MINIO_BROWSER=$browser
MINIO_API_STALE_UPLOADS_EXPIRY=$minio_stale_uploads
MINIO_API_STALE_UPLOADS_CLEANUP_INTERVAL=$minio_stale_interval" || say "unchanged: $server_file"
    server_command=("$minio" server --quiet --certs-dir "$certs" --address "$minio_address")
    [[ -z $minio_console_address ]] || server_command+=(--console-address "$minio_console_address")
    server_command+=("$data")
}

give_data_to_user() { # only a unit has another user
    step="owner of the data"
    local directory owner
    for directory in "$data" "$certs"; do
        owner=$(stat -c %U "$directory" 2>/dev/null) || owner=
        if [[ $owner == "$minio_user" ]]; then
            continue
        fi
        if [[ $dry_run == yes ]]; then
            would "give $directory to $minio_user"
            continue
        fi
        chown -R "$minio_user" "$directory" || fail "$directory cannot be given to $minio_user"
        changed "$directory belongs to $minio_user"
    done
}

run_server() {
    step="server"
    local unit_changed=no
    if [[ $use_systemd == yes ]] && write_unit; then
        unit_changed=yes
    fi
    if [[ $dry_run == yes ]]; then
        if ! server_runs || ((changes)); then
            would "start ${server_command[*]}"
        fi
        return
    fi
    if server_runs && [[ $unit_changed == no && -f $started_file &&
        "$(<"$started_file")" == "$(fingerprint)" ]]; then
        say "unchanged: the server runs on $minio_address"
    else
        restart_server
        fingerprint >"$started_file"
        changed "the server was started on $minio_address"
    fi
    step="health"
    wait_until_healthy
}

set_bucket_up() {
    step="bucket"
    local what="bucket $minio_bucket, versioning, lifecycle, key $node_key for $minio_prefix/"
    if [[ $dry_run == yes ]]; then
        if ! server_runs || ((changes)); then
            would "make sure of $what"
        fi
        return
    fi
    local lines
    lines=$(MC=$mc MC_CONFIG_DIR=$mc_config ENDPOINT=$server_url MINIO_ROOT_USER=$root_user \
        MINIO_ROOT_PASSWORD=$root_password BUCKET=$minio_bucket PREFIX=$minio_prefix \
        ACCESS_KEY=$node_key SECRET_KEY=$node_secret STALE_UPLOADS=$minio_stale_uploads \
        NONCURRENT_DAYS=$minio_noncurrent_days sh "$parts/bucket.sh") ||
        fail "the bucket is not set up, see above"
    report_lines <<<"$lines"
}

stop_local() {
    step="stop"
    if ! server_runs; then
        say "unchanged: no server of $minio_home runs"
        return
    fi
    if [[ $dry_run == yes ]]; then
        would "stop the server"
        return
    fi
    if [[ $use_systemd == yes ]]; then
        systemctl disable --now "${minio_unit##*/}" || fail "systemctl disable --now failed"
    else
        stop_process
    fi
    changed "the server was stopped; data and secrets stay in $minio_home and $data"
}

set_local_up() {
    use_local_paths
    if [[ $stop == yes ]]; then
        [[ ! -d $minio_home ]] || lock_home
        stop_local
        return
    fi
    check_programs
    lock_home
    make_root_password
    make_node_file "${minio_endpoint:-$server_url}"
    write_server_files
    [[ -z $minio_user ]] || give_data_to_user
    run_server
    set_bucket_up
    case ${minio_address%:*} in
    127.* | localhost | "[::1]") ;;
    *) say "note: $minio_address is reached without TLS, and nodes elsewhere need --endpoint;" \
        "see docs/stores.md" ;;
    esac
}
