# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Sourced by setup_minio.sh: the one table of flags, and what is made of it.
# A row: flag | modes | environment name | default | meaning. The value is in the variable of that
# name in small letters without TORPOR_ (MINIO_BUCKET's is minio_bucket).

cache=${TORPOR_CACHE:-/var/cache/torpor}
image=quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z

flags=(
    "bucket|both|TORPOR_MINIO_BUCKET|torpor|bucket to make"
    "prefix|both|TORPOR_MINIO_PREFIX|prod|what the nodes' key may touch: this prefix of the bucket"
    "home|both|TORPOR_MINIO_HOME|/var/lib/torpor-minio|secrets, logs and what was written; keep it"
    "region|both|TORPOR_MINIO_REGION|us-east-1|region that server and clients name"
    "endpoint|both|TORPOR_MINIO_ENDPOINT||URL that the nodes use, if it differs from the server's own"
    "noncurrent-days|both|TORPOR_MINIO_NONCURRENT_DAYS|7|days that replaced and deleted objects are kept"
    "stale-uploads|both|TORPOR_MINIO_STALE_UPLOADS|24h|age at which an unfinished upload is removed"
    "stale-interval|both|TORPOR_MINIO_STALE_INTERVAL|6h|time between two looks for unfinished uploads"
    "wait|both|TORPOR_MINIO_WAIT|60|seconds that the server has to become ready, or to stop"
    "address|local|TORPOR_MINIO_ADDRESS|127.0.0.1:9000|where the server listens"
    "console-address|local|TORPOR_MINIO_CONSOLE_ADDRESS||where its web console listens; empty: no console"
    "data|local|TORPOR_MINIO_DATA||data directory; empty: HOME/data"
    "minio|local|TORPOR_MINIO|$cache/tools/minio|server program (scripts/install-minio builds it)"
    "mc|local|TORPOR_MC|$cache/tools/mc|client program (scripts/install-minio builds it)"
    "systemd|local|TORPOR_MINIO_SYSTEMD|auto|yes, no, or auto: a unit if systemd runs, else a process with a pid file"
    "unit|local|TORPOR_MINIO_UNIT|/etc/systemd/system/torpor-minio.service|the unit's file"
    "user|local|TORPOR_MINIO_USER||user that the unit runs as; empty: root"
    "namespace|kubernetes|TORPOR_MINIO_NAMESPACE|torpor-store|namespace to make"
    "image|kubernetes|TORPOR_MINIO_IMAGE|$image|image of server and client"
    "replicas|kubernetes|TORPOR_MINIO_REPLICAS|1|servers: 1, or 4 to 16 with erasure coding over them"
    "storage|kubernetes|TORPOR_MINIO_STORAGE|100Gi|size of each server's volume"
    "storage-class|kubernetes|TORPOR_MINIO_STORAGE_CLASS||storage class; empty: the cluster's default"
    "memory|kubernetes|TORPOR_MINIO_MEMORY|2Gi|memory request and limit of each server"
    "service|kubernetes|TORPOR_MINIO_SERVICE|ClusterIP|ClusterIP, NodePort or LoadBalancer"
    "allow|kubernetes|TORPOR_MINIO_ALLOW||CIDRs outside the cluster that may connect, with commas"
    "output|kubernetes|TORPOR_MINIO_OUTPUT||directory for the manifests; -: print them; empty: HOME/kubernetes"
    "kubectl|kubernetes|TORPOR_MINIO_KUBECTL|kubectl|program for --apply"
    "context|kubernetes|TORPOR_MINIO_CONTEXT||kubectl's context; empty: the current one"
)

variable_of() { # ENVIRONMENT-NAME
    local name=${1#TORPOR_}
    echo "${name,,}"
}

show_help() {
    cat <<'TEXT'
Usage: setup_minio.sh local|kubernetes [FLAGS]

Sets a store for many torpor nodes up: a MinIO with a bucket, versioning, expiry of replaced
versions and unfinished uploads, and a key that reaches one prefix of the bucket only. Prints the
TORPOR_* lines for the nodes to standard output, everything else to standard error. A second run
changes nothing and says so.

  local        one server on this machine
  kubernetes   manifests for a cluster, written to a directory or applied

  --dry-run    say what would be done, do nothing
  --stop       (local) stop the server; the data stays
  --apply      (kubernetes) apply the manifests with kubectl and wait for the store
  --help       this text

TEXT
    local row flag modes name default meaning
    for row in "${flags[@]}"; do
        IFS='|' read -r flag modes name default meaning <<<"$row"
        [[ $modes == both ]] && modes="" || modes="($modes) "
        printf '  --%-17s %s%s\n  %19s default %s, environment %s\n' \
            "$flag" "$modes" "$meaning" "" "${default:-none}" "$name"
    done
    cat <<'TEXT'

Examples:
  eval "$(scripts/setup_minio.sh local)"
  scripts/setup_minio.sh local --address 10.0.0.5:9000 --data /srv/minio --bucket functions
  scripts/setup_minio.sh local --stop
  scripts/setup_minio.sh kubernetes --output /tmp/store --storage 500Gi --allow 10.0.0.0/8
  scripts/setup_minio.sh kubernetes --apply --replicas 4
TEXT
}

set_defaults() { # the environment, else the table
    local row flag modes name default meaning
    for row in "${flags[@]}"; do
        IFS='|' read -r flag modes name default meaning <<<"$row"
        printf -v "$(variable_of "$name")" '%s' "${!name:-$default}"
    done
}

set_flag() { # FLAG VALUE
    local row flag modes name
    for row in "${flags[@]}"; do
        IFS='|' read -r flag modes name _ <<<"$row"
        [[ $flag == "$1" ]] || continue
        [[ $modes == both || $modes == "$mode" ]] || usage "--$1 is for $modes, not for $mode"
        printf -v "$(variable_of "$name")" '%s' "$2"
        return
    done
    usage "there is no flag --$1"
}

parse_flags() {
    [[ $# -gt 0 ]] || usage "say local or kubernetes"
    case $1 in
    -h | --help) show_help && exit 0 ;;
    local | kubernetes) mode=$1 ;;
    *) usage "no mode is called $1; say local or kubernetes" ;;
    esac
    shift
    while (($#)); do
        case $1 in
        -h | --help) show_help && exit 0 ;;
        --dry-run) dry_run=yes ;;
        --stop)
            [[ $mode == local ]] || usage "--stop is for local"
            stop=yes
            ;;
        --apply)
            [[ $mode == kubernetes ]] || usage "--apply is for kubernetes"
            apply=yes
            ;;
        --*=*) set_flag "$(cut -d= -f1 <<<"${1#--}")" "${1#*=}" ;;
        --*)
            [[ $# -ge 2 ]] || usage "$1 needs a value"
            set_flag "${1#--}" "$2"
            shift
            ;;
        *) usage "what is $1? flags begin with --" ;;
        esac
        shift
    done
}

require() { # FLAG VALUE PATTERN MEANING: values go into files, so only plain ones are taken
    [[ $2 =~ ^($3)$ ]] || usage "--$1 ${2@Q} is not $4"
}

check_values() {
    local path='/[A-Za-z0-9._/@+-]+' age='([0-9]+(ms|s|m|h))+' part='[A-Za-z0-9_-][A-Za-z0-9._-]*'
    local host='(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]*)'
    require bucket "$minio_bucket" '[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]' "a bucket's name"
    require prefix "$minio_prefix" "$part(/$part)*" "a prefix: names joined by /"
    require home "$minio_home" "$path" "an absolute path of plain letters"
    require region "$minio_region" '[a-z0-9-]+' "a region"
    require endpoint "$minio_endpoint" '|https?://[][A-Za-z0-9.:-]+' "an http or https URL without a path"
    require noncurrent-days "$minio_noncurrent_days" '[1-9][0-9]{0,3}' "a number of days"
    require stale-uploads "$minio_stale_uploads" "$age" "an age such as 24h"
    require stale-interval "$minio_stale_interval" "$age" "a time such as 6h"
    require wait "$minio_wait" '[1-9][0-9]{0,3}' "a number of seconds"
    if [[ $mode == local ]]; then
        require address "$minio_address" "$host:[0-9]+" "HOST:PORT"
        require console-address "$minio_console_address" "|$host:[0-9]+" "HOST:PORT"
        require data "$minio_data" "|$path" "an absolute path of plain letters"
        require minio "$minio" "$path" "an absolute path of plain letters"
        require mc "$mc" "$path" "an absolute path of plain letters"
        require systemd "$minio_systemd" 'auto|yes|no' "auto, yes or no"
        require unit "$minio_unit" "$path\.service" "an absolute path that ends in .service"
        require user "$minio_user" '|[a-z_][a-z0-9_-]*' "a user's name"
    else
        local label='[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' cidr='[0-9a-fA-F.:]+/[0-9]{1,3}'
        require namespace "$minio_namespace" "$label" "a namespace's name"
        require image "$minio_image" '[A-Za-z0-9._/:@-]+' "an image"
        require replicas "$minio_replicas" '1|[4-9]|1[0-6]' "1 or 4 to 16"
        require storage "$minio_storage" '[1-9][0-9]*(Mi|Gi|Ti)' "a size such as 100Gi"
        require storage-class "$minio_storage_class" '|[a-z0-9][a-z0-9.-]*' "a storage class"
        require memory "$minio_memory" '[1-9][0-9]*(Mi|Gi|Ti)' "a size such as 2Gi"
        require service "$minio_service" 'ClusterIP|NodePort|LoadBalancer' \
            "ClusterIP, NodePort or LoadBalancer"
        require allow "$minio_allow" "|$cidr(,$cidr)*" "a list of CIDRs with commas"
        require output "$minio_output" "|-|$path" "- or an absolute path of plain letters"
        require kubectl "$minio_kubectl" '[A-Za-z0-9._/@+-]+' "a program"
        require context "$minio_context" '|[A-Za-z0-9._/:@-]+' "a context's name"
    fi
}
