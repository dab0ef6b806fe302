"""Which systemd properties a model may set on its scope: those of systemd.resource-control(5), and why not others.

Values are systemd's business: they are handed over verbatim.
"""

from __future__ import annotations

# Of systemd 252 to 262. An older systemd refuses what it does not know yet, and says so when the model starts.
PROPERTIES = frozenset(
    """
    CPUAccounting CPUWeight StartupCPUWeight CPUQuota CPUQuotaPeriodSec AllowedCPUs StartupAllowedCPUs CPUSetPartition
    MemoryAccounting MemoryMin MemoryLow StartupMemoryLow DefaultMemoryMin DefaultMemoryLow DefaultStartupMemoryLow
    MemoryHigh StartupMemoryHigh MemoryMax StartupMemoryMax MemorySwapMax StartupMemorySwapMax MemoryZSwapMax
    StartupMemoryZSwapMax MemoryZSwapWriteback AllowedMemoryNodes StartupAllowedMemoryNodes
    TasksAccounting TasksMax
    IOAccounting IOWeight StartupIOWeight IODeviceWeight IOReadBandwidthMax IOWriteBandwidthMax IOReadIOPSMax
    IOWriteIOPSMax IODeviceLatencyTargetSec
    IPAccounting IPAddressAllow IPAddressDeny IPIngressFilterPath IPEgressFilterPath BPFProgram SocketBindAllow
    SocketBindDeny RestrictNetworkInterfaces BindNetworkInterface NFTSet
    DisableControllers
    ManagedOOMSwap ManagedOOMMemoryPressure ManagedOOMMemoryPressureLimit ManagedOOMMemoryPressureDurationSec
    ManagedOOMPreference OOMRules
    MemoryPressureWatch MemoryPressureThresholdSec CPUPressureWatch CPUPressureThresholdSec IOPressureWatch
    IOPressureThresholdSec
    """.split()  # noqa: SIM905 - sixty quoted words are no easier to read
)

# Properties that the guarantee rests on, and what a person can do instead.
_FILTER = "gpusvc derives the device filter from the GPUs that the model gets; see devices in [gpu]."
_TREE = "The engine's processes must stay in the one cgroup that systemd kills as a whole."
_STOP = "gpusvc decides how a model is stopped; see stop_timeout."
_LIFE = "The scope lives and dies with model@NAME.service; put dependencies into a drop-in of that unit."
OWNED = {
    "DeviceAllow": _FILTER,
    "DevicePolicy": _FILTER,
    "Slice": "Every model's scope is in gpusvc-models.slice; limits for all models go into a drop-in of that slice.",
    "Delegate": _TREE,
    "DelegateSubgroup": _TREE,
    "CoredumpReceive": _TREE,
    "PIDs": _TREE,
    "KillMode": _STOP,
    "KillSignal": _STOP,
    "FinalKillSignal": _STOP,
    "SendSIGKILL": _STOP,
    "SendSIGHUP": _STOP,
    "TimeoutStopSec": _STOP,
    "RuntimeMaxSec": "Set it on model@NAME.service, in a drop-in.",
    "OOMPolicy": "Set it on model@NAME.service, in a drop-in.",
    "Description": "Use description at the top of the file.",
} | dict.fromkeys(("BindsTo", "PartOf", "Requires", "Requisite", "Wants", "After", "Before", "Conflicts"), _LIFE)

# For all other properties: scopes take none of systemd.exec(5).
ELSEWHERE = "Set it on model@NAME.service, in a drop-in: the engine inherits what can be inherited."

# What systemd 252 deprecated and 258 dropped, with the successors on the unified hierarchy.
LEGACY = {
    "CPUShares": "CPUWeight",
    "StartupCPUShares": "StartupCPUWeight",
    "MemoryLimit": "MemoryMax",
    "BlockIOAccounting": "IOAccounting",
    "BlockIOWeight": "IOWeight",
    "StartupBlockIOWeight": "StartupIOWeight",
    "BlockIODeviceWeight": "IODeviceWeight",
    "BlockIOReadBandwidth": "IOReadBandwidthMax",
    "BlockIOWriteBandwidth": "IOWriteBandwidthMax",
}
