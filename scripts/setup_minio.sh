#!/bin/bash
# Sets a store for many torpor nodes up: a MinIO here or in Kubernetes, and a key for one prefix.
set -Eeuo pipefail

parts=$(cd "$(dirname "${BASH_SOURCE[0]}")/minio" && pwd)
manifests=${parts%/scripts/minio}/deploy/kubernetes/minio
mode=
dry_run=no
stop=no
apply=no
node_lines=

# shellcheck source=scripts/minio/steps.sh
. "$parts/steps.sh"
# shellcheck source=scripts/minio/flags.sh
. "$parts/flags.sh"
# shellcheck source=scripts/minio/server.sh
. "$parts/server.sh"
# shellcheck source=scripts/minio/local.sh
. "$parts/local.sh"
# shellcheck source=scripts/minio/kubernetes.sh
. "$parts/kubernetes.sh"

set_defaults
parse_flags "$@"
check_values
trap 'on_error $? "$BASH_COMMAND"' ERR

mc_config=$(mktemp -d)
trap 'rm -rf "$mc_config"' EXIT

case $mode in
local) set_local_up ;;
kubernetes) set_kubernetes_up ;;
esac

if ((changes == 0)); then
    say "nothing changed"
elif [[ $dry_run == yes ]]; then
    say "nothing was done"
fi
if [[ $stop == no && $dry_run == no ]]; then
    print_node_lines
fi
