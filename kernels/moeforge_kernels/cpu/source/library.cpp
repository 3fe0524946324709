// The C interface that moeforge_kernels.cpu.library calls.
#include <sys/syscall.h>
#include <unistd.h>

#include "backward.h"
#include "forward.h"
#include "lora_backward.h"
#include "lora_few.h"
#include "lora_forward.h"
#include "route.h"

using namespace moeforge;

template <class Work>
static int64_t guarded(Work&& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Passes over products of tiles.
template <template <class> class Pass>
static int64_t run(const Call& call, bool is_bf16) {
    return guarded([&] {
        if (!is_bf16) Pass<Float32>(call).run();
#ifdef __AMX_BF16__
        else Pass<BFloat16>(call).run();
#endif
    });
}

// Work whose elements are of either type, and whose sums are float32.
template <class Work>
static int64_t of_either(bool is_bf16, Work&& work) {
    return guarded([&] {
        if (!is_bf16) work(float{});
#ifdef __AVX512BF16__
        else work(bf16{});
#endif
    });
}

extern "C" {

// The sizes of what Python passes, so that a mismatch with its idea of them is found at once.
int64_t moeforge_call_bytes() { return sizeof(Call); }
int64_t moeforge_lora_call_bytes() { return sizeof(LoraCall); }
int64_t moeforge_lora_few_bytes() { return sizeof(LoraFew); }
int64_t moeforge_lora_network_bytes() { return sizeof(LoraNetwork); }
int64_t moeforge_route_bytes() { return sizeof(Route); }

// Whether bf16 can be loaded and stored sixteen at a time.
int64_t moeforge_has_bf16_vectors() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// Whether products of bf16 tiles may run here: the compiler has AMX, and the system lets this process use it.
int64_t moeforge_has_bf16_tiles() {
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
int64_t moeforge_lora_forward(const LoraCall* call, int64_t is_bf16) {
    return of_either(is_bf16, [&](auto element) { LoraForward<Of<decltype(element)>>(*call).run(); });
}
int64_t moeforge_lora_backward(const LoraCall* call, int64_t is_bf16) {
    return of_either(is_bf16, [&](auto element) { LoraBackward<Of<decltype(element)>>(*call).run(); });
}
int64_t moeforge_lora_few(const LoraFew* call, int64_t is_bf16) {
    return of_either(is_bf16, [&](auto element) { few_experts<decltype(element)>(*call); });
}
int64_t moeforge_lora_network(const LoraNetwork* call, int64_t is_bf16) {
    return of_either(is_bf16, [&](auto element) { few_network<decltype(element)>(*call); });
}
int64_t moeforge_route(const Route* call, int64_t) { return guarded([&] { Router(*call).run(); }); }
}
