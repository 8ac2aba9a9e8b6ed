"""Which features of an x86 processor a program may be using.

/proc/cpuinfo lists, beside instructions, what only a kernel or a hypervisor uses, how a kernel mitigates faults of the processor,
and what it found out about its clock. These differ between equal processors, by microcode, firmware, kernel and hypervisor (compare
arch/x86/include/asm/cpufeatures.h), and say nothing of what a job needs. A name that is not known here counts.
"""

from __future__ import annotations

from collections.abc import Iterable

_CLOCK = """
constant_tsc nonstop_tsc nonstop_tsc_s3 tsc_known_freq tsc_reliable tsc_adjust tsc_deadline_timer tsc_scale art arat aperfmperf
"""
_POWER = """
acpi tm tm2 est ida pln pts dts dtherm epb hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req hfi hw_pstate cpb proc_feedback rapl
acc_power cppc ring3mwait monitor fast_cppc cpuid_fault
"""
_KERNEL_MADE = """
up rep_good nopl always xtopology cpuid extd_apicid amd_dcm syscall32 sysenter32 k8 k7 p3 p4 arch_perfmon pebs bts ds_cpl dtes64
perfctr_core perfctr_nb perfctr_llc perfctr_l2 perfmon_v2 bpext ptsc pdcm amd_lbr_v2 amd_lbr_pmc_freeze lbrv arch_lbr intel_pt
topoext nodeid_msr cmp_legacy ht apic extapic x2apic x2avic mtrr pge pse pse36 pat pae mca mce msr vme de sep pbe ss xtpr cid sdbg
dca osvw ibs skinit wdt tce cr8_legacy smep smap umip pcid invpcid invpcid_single nx smx svm vmx pti kaiser pconfig
bus_lock_detect split_lock_detect core_capabilities arch_capabilities intel_ppin amd_ppin hypervisor wbnoinvd irperf xsaveerptr
overflow_recov succor smca brs fred lkgs lass nmi_source
"""
_VIRTUAL = """
tpr_shadow vnmi flexpriority ept ept_ad vpid npt svm_lock nrip_save vmcb_clean flushbyasid decodeassists pausefilter pfthreshold
avic v_vmsave_vmload vgif v_spec_ctrl svme_addr_chk vmmcall vmcall vmw_vmmcall xenpv pvunlock vcpupreempt tdx_guest
tdx_host_platform sme sev sev_es sev_snp v_tsc_aux sme_coherent debug_swap vm_page_flush
"""
_MITIGATIONS = """
ibrs ibpb stibp ssbd ibrs_enhanced msr_spec_ctrl retpoline retpoline_amd retpoline_lfence rsb_ctxsw rsb_vmexit rsb_vmexit_lite
md_clear flush_l1d spec_ctrl intel_stibp spec_ctrl_ssbd amd_ibpb amd_ibrs amd_stibp amd_stibp_always_on stibp_always_on amd_ssbd
virt_ssbd amd_ssb_no ssb_no amd_psfd btc_no ibpb_ret ibpb_brtype srso_no sbpb rfds_clear bhi_ctrl bhi_dis_s srbds_ctrl
tsx_force_abort tsx_ctrl unret entry_ibpb rrsba_ctrl zen cat_l2 cat_l3 cdp_l2 cdp_l3 mba bmec cqm cqm_llc cqm_occup_llc
cqm_mbm_total cqm_mbm_local rdt_a per_thread_mba smba fence_swapgs_user fence_swapgs_kernel clear_cpu_buf null_sel_clr_base
autoibrs
"""
NOT_FOR_PROGRAMS = frozenset(" ".join((_CLOCK, _POWER, _KERNEL_MADE, _VIRTUAL, _MITIGATIONS)).split())


def for_programs(flags: Iterable[str]) -> frozenset[str]:
    """Those of a processor's features that a program could be using."""
    return frozenset(flags) - NOT_FOR_PROGRAMS
