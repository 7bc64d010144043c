"""`cluster/ray-up/aws.yaml`: Ray accepts it, and the security group that Ray gives its machines is closed."""

from typing import Any

import boto3
import pytest
from ray.autoscaler._private.aws import config as ray_aws
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import CLUSTER, documents
from tests.cluster.test_pods import MACHINES


@pytest.fixture
def ray_up() -> dict[str, Any]:
    return documents(CLUSTER / "ray-up" / "aws.yaml")[0]


def test_ray_accepts_the_ray_up_file(ray_up: dict[str, Any]) -> None:
    validate_config(prepare_config(ray_up))


def test_a_key_that_ray_up_does_not_know_is_found(ray_up: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    ray_up["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(ray_up))


def test_ray_up_has_gpus_on_spot_a_head_without_work_and_a_private_dashboard(ray_up: dict[str, Any]) -> None:
    types = ray_up["available_node_types"]
    head, cpu, gpu = types["head"], types["cpu"], types["gpu"]
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for worker in (cpu, gpu):
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0 and gpu["resources"]["CPU"] >= 2 and cpu["min_workers"] * cpu["resources"]["CPU"] > 1
    assert cpu["max_workers"] + gpu["max_workers"] <= ray_up["max_workers"]
    start = " ".join(ray_up["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in ray_up["docker"]["run_options"]
    assert not ray_up["provider"]["cache_stopped_nodes"]
    assert types["gpu"]["resources"] == {"CPU": MACHINES[gpu["node_config"]["InstanceType"]][0], "GPU": 1}


@pytest.fixture
def group(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A security group made as cluster/README.md says, in a network with a subnet."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    for cached in (resource_cache, ray_aws._get_subnets_or_die):
        cached.cache_clear()  # they may hold another server's
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone="eu-central-1a")
    group: str = ec2.create_security_group(GroupName="persona-plug", Description="Ray", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group, IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    )
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])
    return group


def open_to_all(config: dict[str, Any]) -> list[int]:
    """Ports that are open to the internet after Ray has configured the groups of all machines."""
    found = ray_aws._configure_security_group(config)
    used = {one for node in found["available_node_types"].values() for one in node["node_config"]["SecurityGroupIds"]}
    rules = [rule for one in used for rule in boto3.resource("ec2").SecurityGroup(one).ip_permissions]
    assert rules
    return [rule["FromPort"] for rule in rules if {"CidrIp": "0.0.0.0/0"} in rule["IpRanges"]]


def test_ray_opens_no_port_of_a_group_that_exists(ray_up: dict[str, Any], group: str) -> None:
    config = prepare_config(ray_up)
    for node in config["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
        node["node_config"]["SecurityGroupIds"] = [group]
    assert open_to_all(config) == []


def test_ray_opens_port_22_to_all_in_a_group_that_it_makes(ray_up: dict[str, Any], group: str) -> None:
    (subnet,) = boto3.client("ec2").describe_subnets(
        Filters=[{"Name": "vpc-id", "Values": [boto3.resource("ec2").SecurityGroup(group).vpc_id]}]
    )["Subnets"]
    config = prepare_config(ray_up)
    config["provider"]["security_group"] = {"GroupName": "by-ray"}
    for node in config["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
        node["node_config"]["SubnetIds"] = [subnet["SubnetId"]]
    assert open_to_all(config) == [22]
