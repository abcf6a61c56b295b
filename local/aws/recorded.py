"""The resource types that the local AWS lacks, in one list: a stack records them, nothing is created or tried.

Any other type that it does not know fails the deploy.
"""

# Each with the prefix of its made-up id, which `Ref` gives, and the attributes that give the same id.
RECORDED_ONLY: dict[str, tuple[str, tuple[str, ...]]] = {
    "AWS::EC2::EIP": ("eipalloc-", ("AllocationId",)),
    "AWS::EC2::NatGateway": ("nat-", ("NatGatewayId",)),
    "AWS::Logs::QueryDefinition": ("query-", ("QueryDefinitionId",)),
    "AWS::Route53Resolver::FirewallDomainList": ("rslvr-fdl-", ("Id",)),
    "AWS::Route53Resolver::FirewallRuleGroup": ("rslvr-frg-", ("Id",)),
    "AWS::Route53Resolver::FirewallRuleGroupAssociation": ("rslvr-frgassoc-", ("Id",)),
}
