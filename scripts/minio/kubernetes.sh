# shellcheck shell=bash disable=SC2034,SC2154 # the parts share variables
# Sourced by setup_minio.sh: the manifests of deploy/kubernetes/minio with this run's values.

declare -A values # what stands for @NAME@ in a manifest

base64_of() {
    printf '%s' "$1" | base64 -w 0
}

short_hash() {
    printf '%s' "$*" | sha256sum | cut -c 1-10
}

script_block() { # the bucket script as lines of a YAML block
    sed 's/^./    &/' "$parts/bucket.sh"
}

set_values() {
    local servers=/data/minio
    if ((minio_replicas > 1)); then
        servers="http://torpor-minio-{0...$((minio_replicas - 1))}"
        servers+=".torpor-minio-peers.$minio_namespace.svc.cluster.local:9000/data/minio"
    fi
    values=(
        [NAMESPACE]=$minio_namespace [IMAGE]=$minio_image [REPLICAS]=$minio_replicas
        [SERVERS]=$servers [STORAGE]=$minio_storage [MEMORY]=$minio_memory
        [REGION]=$minio_region [BUCKET]=$minio_bucket [PREFIX]=$minio_prefix
        [NONCURRENT_DAYS]=$minio_noncurrent_days [STALE_UPLOADS]=$minio_stale_uploads
        [STALE_INTERVAL]=$minio_stale_interval [SERVICE]=$minio_service
        [ROOT_USER]=$(base64_of "$root_user") [ROOT_PASSWORD]=$(base64_of "$root_password")
        [STORE]=$(base64_of "s3://$minio_bucket/$minio_prefix")
        [ENDPOINT]=$(base64_of "$node_endpoint") [REGION_64]=$(base64_of "$minio_region")
        [KEY]=$(base64_of "$node_key") [SECRET]=$(base64_of "$node_secret")
        [SCRIPT]=$(script_block)
        [ROOT_HASH]=$(short_hash "$root_user" "$root_password")
    )
    # a job cannot be changed: another script or another value is another job
    values[JOB_HASH]=$(short_hash "${values[SCRIPT]}" "$minio_image" "$minio_bucket" \
        "$minio_prefix" "$minio_noncurrent_days" "$minio_stale_uploads" "$node_key" "$node_secret")
    set_optional_values
}

set_optional_values() { # lines that are there or not
    local cidr
    values[STORAGE_CLASS]=
    [[ -z $minio_storage_class ]] || values[STORAGE_CLASS]="
        storageClassName: \"$minio_storage_class\""
    values[TRAFFIC_POLICY]=
    # else the network policy would see a node's address in place of the client's
    [[ $minio_service == ClusterIP ]] || values[TRAFFIC_POLICY]="
  externalTrafficPolicy: Local"
    values[ALLOW]=
    for cidr in ${minio_allow//,/ }; do
        values[ALLOW]+="
        - ipBlock:
            cidr: \"$cidr\""
    done
}

render() { # FILE
    local text name
    text=$(<"$1")
    for name in "${!values[@]}"; do
        text=${text//"@$name@"/"${values[$name]}"}
    done
    if [[ $text =~ @[A-Z_0-9]+@ ]]; then
        fail "nothing stands for ${BASH_REMATCH[0]} in $1"
    fi
    echo "$text"
}

write_manifests() {
    step="manifests"
    local file text
    [[ $output == - ]] || make_directory "$output" 700
    for file in "$manifests"/*.yaml; do
        text=$(render "$file") || exit 1
        if [[ $output == - ]]; then
            [[ $dry_run == yes ]] || printf -- '---\n%s\n' "$text"
        else
            write_file "$output/${file##*/}" 600 "$text" || say "unchanged: $output/${file##*/}"
            applied+=(-f "$output/${file##*/}")
        fi
    done
}

kube() {
    "$minio_kubectl" ${minio_context:+--context "$minio_context"} "$@"
}

apply_manifests() {
    step="apply"
    command -v "$minio_kubectl" >/dev/null || fail "there is no program $minio_kubectl"
    if [[ $dry_run == yes ]]; then
        would "run kubectl apply ${applied[*]}, and wait until the store is ready"
        return
    fi
    local lines line
    lines=$(kube apply "${applied[@]}") || fail "kubectl apply failed, see above"
    while IFS= read -r line; do
        case $line in
        *" unchanged") say "unchanged: ${line% unchanged}" ;;
        *) changed "$line" ;;
        esac
    done <<<"$lines"
    step="health"
    kube -n "$minio_namespace" rollout status statefulset/torpor-minio \
        --timeout "${minio_wait}s" >&2 || fail "the servers are not ready, see above"
    step="bucket"
    local job=torpor-minio-bucket-${values[JOB_HASH]}
    if ! kube -n "$minio_namespace" wait --for=condition=complete "job/$job" \
        --timeout "${minio_wait}s" >&2; then
        kube -n "$minio_namespace" logs "job/$job" --tail 20 >&2 || say "the job has no log yet"
        fail "the job $job did not finish, see above"
    fi
}

set_kubernetes_up() {
    state=$minio_home/kubernetes/$minio_namespace
    output=${minio_output:-$state/manifests}
    applied=()
    [[ $apply == no || $output != - ]] || usage "--apply needs a directory, not --output -"
    lock_home
    make_directory "$state" 700
    make_root_password
    node_endpoint=${minio_endpoint:-http://torpor-minio.$minio_namespace.svc.cluster.local:9000}
    make_node_file "$node_endpoint"
    set_values
    write_manifests
    if [[ $apply == yes ]]; then
        apply_manifests
    elif [[ $output != - ]]; then
        say "apply them with: kubectl apply ${applied[*]}"
    fi
    [[ $output != - ]] || node_lines="# ${node_lines//$'\n'/$'\n# '}"
}
