# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Sourced by setup_minio.sh: steps that can fail, files and secrets that are written once.

step=start
changes=0

say() {
    echo "setup_minio: $*" >&2
}

usage() { # WHY
    say "$1"
    say "setup_minio.sh --help lists modes and flags"
    exit 2
}

fail() { # WHY [EXIT-CODE]
    say "failed at \"$step\": $1"
    exit "${2:-1}"
}

on_error() { # the trap for a command that no step looked after
    local code=$1 command=$2
    fail "$command ended with $code" "$code"
}

changed() {
    changes=$((changes + 1))
    say "changed: $*"
}

would() {
    changes=$((changes + 1))
    say "would: $*"
}

report_lines() { # "changed: ..." and "unchanged: ..." of a child, as its own
    local line
    while IFS= read -r line; do
        case $line in
        "changed: "*) changed "${line#changed: }" ;;
        *) say "$line" ;;
        esac
    done
}

make_directory() { # PATH MODE
    [[ -d $1 ]] && return
    if [[ $dry_run == yes ]]; then
        would "make directory $1"
        return
    fi
    { mkdir -p "$1" && chmod "$2" "$1"; } 2>/dev/null || fail "directory $1 cannot be made"
    changed "directory $1"
}

write_file() { # PATH MODE TEXT: true if it had to be written
    if [[ -f $1 && "$(<"$1")" == "$3" && "$(stat -c %a "$1")" == "$2" ]]; then
        return 1
    fi
    if [[ $dry_run == yes ]]; then
        would "write $1 (mode $2)"
        return
    fi
    # a name of its own, renamed: nobody ever reads half a file, or a secret with another mode
    (umask 077 && printf '%s\n' "$3" >"$1.new") || fail "$1 cannot be written"
    chmod "$2" "$1.new"
    mv "$1.new" "$1"
    changed "$1 was written"
}

random_hex() { # CHARACTERS
    od -An -v -N $(($1 / 2)) -tx1 /dev/urandom | tr -d ' \n'
}

value_in() { # FILE NAME: a value of a file of NAME=value or export NAME='value' lines
    local line
    while IFS= read -r line; do
        line=${line#export }
        if [[ ${line%%=*} == "$2" ]]; then
            line=${line#*=}
            echo "${line//\'/}"
            return
        fi
    done <"$1"
    fail "$1 has no $2; restore it from a backup, or move it away to get new secrets"
}

lock_home() { # two runs at a time would make two passwords
    step="directories"
    make_directory "$minio_home" 711
    [[ -d $minio_home ]] || return 0 # a dry run
    { exec 9>"$minio_home/.lock"; } 2>/dev/null || fail "$minio_home cannot be written"
    flock -n 9 || fail "another setup_minio.sh is at work in $minio_home"
}

make_root_password() {
    step="root password"
    root_file=$state/root.env
    if [[ ! -f $root_file ]]; then
        root_user=torpor-root
        root_password=$(random_hex 40)
        write_file "$root_file" 600 "MINIO_ROOT_USER=$root_user
MINIO_ROOT_PASSWORD=$root_password"
        return
    fi
    root_user=$(value_in "$root_file" MINIO_ROOT_USER) || exit 1
    root_password=$(value_in "$root_file" MINIO_ROOT_PASSWORD) || exit 1
    say "unchanged: root password in $root_file"
}

make_node_file() { # ENDPOINT: the key's own secret and what a node needs to use it
    step="key"
    local directory=$state/keys/$minio_bucket/$minio_prefix id secret
    node_file=$directory/torpor.env
    make_directory "$state/keys" 700
    make_directory "$directory" 700
    if [[ -f $node_file ]]; then
        id=$(value_in "$node_file" TORPOR_S3_ACCESS_KEY_ID) || exit 1
        secret=$(value_in "$node_file" TORPOR_S3_SECRET_ACCESS_KEY) || exit 1
    else
        id=torpor-$(random_hex 12)
        secret=$(random_hex 40)
    fi
    node_key=$id
    node_secret=$secret
    node_lines="export TORPOR_STORE='s3://$minio_bucket/$minio_prefix'
export TORPOR_S3_ENDPOINT='$1'
export TORPOR_S3_REGION='$minio_region'
export TORPOR_S3_ACCESS_KEY_ID='$id'
export TORPOR_S3_SECRET_ACCESS_KEY='$secret'"
    write_file "$node_file" 600 "$node_lines" || say "unchanged: $node_file"
}

print_node_lines() {
    say "a node needs these lines, they are also in $node_file:"
    echo "$node_lines"
}
