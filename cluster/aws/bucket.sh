#!/usr/bin/env bash
# Configures an existing bucket for a store: cluster/aws/bucket.sh BUCKET REGION. Safe to run again.
#
# Versioning stays off: `jobs.forget` promises that the bytes are gone, and a versioned bucket keeps them. If your
# company requires versions, lifecycle.json deletes old ones after a day; until then no one is forgotten. No rule may
# expire objects below persona/: only the tables know which files they need (`jobs.store vacuum` deletes the others).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
bucket="$1" region="$2"
s3api() { aws s3api "$1" --bucket "$bucket" --region "$region" "${@:2}"; }

s3api put-public-access-block --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
s3api put-bucket-ownership-controls --ownership-controls 'Rules=[{ObjectOwnership=BucketOwnerEnforced}]'
s3api put-bucket-encryption --server-side-encryption-configuration \
    'Rules=[{ApplyServerSideEncryptionByDefault={SSEAlgorithm=AES256},BucketKeyEnabled=true}]'
s3api put-bucket-lifecycle-configuration --lifecycle-configuration "file://$here/lifecycle.json"
s3api put-bucket-policy --policy "$(sed "s/:::corp/:::$bucket/g" "$here/bucket-policy.json")"
s3api get-bucket-versioning
