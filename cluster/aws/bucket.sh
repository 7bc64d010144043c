#!/usr/bin/env bash
# Settings of a bucket for a store: cluster/aws/bucket.sh BUCKET REGION. Safe to run again; it makes no bucket.
#
# Versioning stays off: `jobs.forget` promises that the bytes are gone, and a bucket that keeps versions keeps them.
# Where a rule of the house wants versions, lifecycle.json ends them after a day; until then nobody is forgotten. No rule
# may expire objects below persona/: the tables know which files they need, S3 does not (`jobs.store vacuum` deletes).
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
