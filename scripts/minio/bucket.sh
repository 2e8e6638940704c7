#!/bin/sh
# Sets a bucket of a running MinIO up for torpor: versioning, lifecycle, a key for one prefix.
# POSIX shell and mc only, since the bucket job runs it in MinIO's own image.
#
# From the environment: MC, ENDPOINT, MINIO_ROOT_USER, MINIO_ROOT_PASSWORD, BUCKET, PREFIX,
# ACCESS_KEY, SECRET_KEY, NONCURRENT_DAYS, STALE_UPLOADS. Prints a line "changed: ..." or
# "unchanged: ..." for each thing; a failure says its step and why, and exits with 1.
set -eu

scheme=${ENDPOINT%%://*}
host=${ENDPOINT#*://}
# mc reads its hosts from the environment: no secret is in a command line or in a file
export MC_HOST_root="$scheme://$MINIO_ROOT_USER:$MINIO_ROOT_PASSWORD@$host"
export MC_HOST_node="$scheme://$ACCESS_KEY:$SECRET_KEY@$host"

fail() { # STEP WHY
    echo "failed at \"$1\": $2" >&2
    exit 1
}

ask() { # STEP MC-ARGUMENTS...: what mc prints, or the end
    step=$1
    shift
    answer=$("$MC" "$@" 2>&1) || fail "$step" "$answer"
    echo "$answer"
}

has() { # TEXT FRAGMENT
    case $1 in *"$2"*) ;; *) return 1 ;; esac
}

make_bucket() {
    if "$MC" stat "root/$BUCKET" >/dev/null 2>&1; then
        echo "unchanged: bucket $BUCKET"
        return
    fi
    ask "bucket" mb "root/$BUCKET" >/dev/null
    echo "changed: bucket $BUCKET was made"
}

enable_versioning() {
    state=$(ask "versioning" --json version info "root/$BUCKET") || exit 1
    if has "$state" '"status":"Enabled"'; then
        echo "unchanged: versioning"
        return
    fi
    ask "versioning" version enable "root/$BUCKET" >/dev/null
    echo "changed: versioning was switched on"
}

refuse_foreign_rules() { # RULES: setting ours would remove them
    rest=$1
    while has "$rest" '"ID":"'; do
        rest=${rest#*'"ID":"'}
        rule=${rest%%'"'*}
        [ "$rule" = torpor-noncurrent ] || fail "lifecycle" \
            "bucket $BUCKET has a lifecycle rule of its own, $rule; remove it or use another bucket"
    done
}

set_lifecycle() {
    days="\"NoncurrentVersionExpiration\":{\"NoncurrentDays\":$NONCURRENT_DAYS}"
    marker='"Expiration":{"ExpiredObjectDeleteMarker":true}'
    now=$("$MC" ilm rule export "root/$BUCKET" 2>&1) ||
        has "$now" "lifecycle configuration does not exist" || fail "lifecycle" "$now"
    refuse_foreign_rules "$now"
    if has "$now" "$days" && has "$now" "$marker"; then
        echo "unchanged: lifecycle, versions that were replaced go after $NONCURRENT_DAYS days"
        return
    fi
    rule="{\"ID\":\"torpor-noncurrent\",\"Filter\":{\"Prefix\":\"\"},\"Status\":\"Enabled\",$marker,$days}"
    answer=$(echo "{\"Rules\":[$rule]}" | "$MC" ilm rule import "root/$BUCKET" 2>&1) ||
        fail "lifecycle" "$answer"
    # MinIO drops silently what it does not know, so what it kept is what counts
    now=$(ask "lifecycle" ilm rule export "root/$BUCKET") || exit 1
    if ! { has "$now" "$days" && has "$now" "$marker"; }; then
        fail "lifecycle" "the server kept only $now"
    fi
    echo "changed: lifecycle, versions that were replaced go after $NONCURRENT_DAYS days"
}

check_unfinished_uploads() { # the server's own setting: MinIO has no lifecycle rule for them
    now=$(ask "unfinished uploads" admin config get root api) || exit 1
    has "$now" "stale_uploads_expiry=$STALE_UPLOADS" ||
        has "$now" "MINIO_API_STALE_UPLOADS_EXPIRY=$STALE_UPLOADS" ||
        fail "unfinished uploads" "the server does not run with an expiry of $STALE_UPLOADS"
    echo "unchanged: uploads that nobody finishes go after $STALE_UPLOADS"
}

statement() { # EFFECT ACTION RESOURCE [MORE]: one action each, since MinIO prints them in any order
    echo "{\"Effect\":\"$1\",\"Action\":[\"s3:$2\"],\"Resource\":[\"arn:aws:s3:::$3\"]${4-}}"
}

policy_text() { # just as MinIO prints it
    below="$BUCKET/$PREFIX/*"
    list=$(statement Allow ListBucket "$BUCKET" \
        ",\"Condition\":{\"StringLike\":{\"s3:prefix\":[\"$PREFIX/*\"]}}")
    objects=
    for action in GetObject PutObject DeleteObject AbortMultipartUpload ListMultipartUploadParts; do
        objects="$objects$(statement Allow "$action" "$below"),"
    done
    # without the denial MinIO lets whoever may delete an object delete its old versions too
    keep=$(statement Deny DeleteObjectVersion "$below")
    echo "{\"Version\":\"2012-10-17\",\"Statement\":[$list,$objects$keep]}"
}

set_policy() {
    wanted=$(policy_text)
    now=$("$MC" admin policy info root "$ACCESS_KEY" 2>&1) ||
        has "$now" "policy does not exist" || fail "policy" "$now"
    if has "$now" "$wanted"; then
        echo "unchanged: policy $ACCESS_KEY"
        return
    fi
    answer=$(echo "$wanted" | "$MC" admin policy create root "$ACCESS_KEY" /dev/stdin 2>&1) ||
        fail "policy" "$answer"
    echo "changed: policy $ACCESS_KEY allows $BUCKET/$PREFIX/ and nothing else"
}

make_key() {
    now=$("$MC" --json admin user info root "$ACCESS_KEY" 2>&1) ||
        has "$now" "user does not exist" || fail "key" "$now"
    if has "$now" "\"policyName\":\"$ACCESS_KEY\"" && has "$now" '"userStatus":"enabled"' &&
        "$MC" ls "node/$BUCKET/$PREFIX/" >/dev/null 2>&1; then
        echo "unchanged: key $ACCESS_KEY"
        return
    fi
    answer=$(printf '%s\n%s\n' "$ACCESS_KEY" "$SECRET_KEY" | "$MC" admin user add root 2>&1) ||
        fail "key" "$answer"
    ask "key" admin policy attach root "$ACCESS_KEY" --user "$ACCESS_KEY" >/dev/null
    echo "changed: key $ACCESS_KEY was made"
}

check_key() { # what the nodes will do with it, and one thing that they must not
    ask "key" ls "node/$BUCKET/$PREFIX/" >/dev/null
    if "$MC" ls "node/$BUCKET/" >/dev/null 2>&1; then
        fail "key" "$ACCESS_KEY can list what is outside $BUCKET/$PREFIX/"
    fi
}

ask "health" ready root >/dev/null
make_bucket
enable_versioning
set_lifecycle
check_unfinished_uploads
set_policy
make_key
check_key
