// The C interface that moeforge_kernels.cpu.library calls.
#include <sys/syscall.h>
#include <unistd.h>

#include "backward.h"
#include "forward.h"
#include "lora_backward.h"
#include "lora_forward.h"

using namespace moeforge;

template <template <class> class Pass, class Call>
static int64_t run(const Call& call, bool is_bf16) {
    try {
        if (!is_bf16) Pass<Float32>(call).run();
#ifdef __AMX_BF16__
        else Pass<BFloat16>(call).run();
#endif
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" {

// The sizes of what Python passes, so that a mismatch with its idea of them is found at once.
int64_t moeforge_call_bytes() { return sizeof(Call); }
int64_t moeforge_lora_call_bytes() { return sizeof(LoraCall); }

// Whether the bf16 kernels may run here: the compiler has AMX, and the system lets this process use it.
int64_t moeforge_has_bf16() {
#ifdef __AMX_BF16__
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

// 0, or 1 where memory ran out.
int64_t moeforge_forward(const Call* call, int64_t is_bf16) { return run<Forward>(*call, is_bf16); }
int64_t moeforge_backward(const Call* call, int64_t is_bf16) { return run<Backward>(*call, is_bf16); }
int64_t moeforge_lora_forward(const LoraCall* call, int64_t is_bf16) { return run<LoraForward>(*call, is_bf16); }
int64_t moeforge_lora_backward(const LoraCall* call, int64_t is_bf16) { return run<LoraBackward>(*call, is_bf16); }
}
