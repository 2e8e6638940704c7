/* From the kernel's hand-over to a guest that can answer: modules, file systems, network.
 *
 * Disks: /dev/vda is the image (squashfs), /dev/vdb the scratch disk (ext4), /dev/vdc the app
 * (squashfs, an empty placeholder until a function starts). The function's root is an overlay of
 * the image and, once there is one, the app, with everything written kept on the scratch disk. The
 * guest's names are in memory, the same in each root that it has.
 */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MODULE_LIST "/lib/modules-load-order"
#define APP_DISK "/dev/vdc"

static void make_directory(const char *path, mode_t permissions)
{
    if (mkdir(path, permissions) != 0 && errno != EEXIST)
        log_line("mkdir %s: %s", path, strerror(errno));
}

static void mount_or_die(const char *source, const char *target, const char *type,
                         unsigned long flags, const char *options)
{
    make_directory(target, 0755);
    if (mount(source, target, type, flags, options) != 0)
        die("mount %s on %s: %s", source, target, strerror(errno));
}

static void open_console(void)
{
    int console = open("/dev/console", O_RDWR | O_NOCTTY);

    if (console < 0)
        return;
    for (int fd = 0; fd <= 2; fd++)
        if (console != fd)
            dup2(console, fd);
    if (console > 2)
        close(console);
}

/* The file is deleted once the module is in the kernel: its pages need not be in any snapshot. */
static void load_module(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        die("module %s: %s", path, strerror(errno));
    if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
        die("module %s: %s", path, strerror(errno));
    close(fd);
    unlink(path);
}

static void load_modules(void)
{
    char path[256];
    FILE *list = fopen(MODULE_LIST, "re");

    if (!list)
        die("%s: %s", MODULE_LIST, strerror(errno));
    while (fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = '\0';
        load_module(path);
    }
    fclose(list);
}

static struct sockaddr ip_address(const char *text)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct sockaddr result;

    inet_pton(AF_INET, text, &address.sin_addr);
    memcpy(&result, &address, sizeof result);
    return result;
}

static void net_ioctl(int fd, unsigned long request, void *argument, const char *what)
{
    if (ioctl(fd, request, argument) != 0)
        die("network: %s: %s", what, strerror(errno));
}

static void bring_up(int fd, const char *name)
{
    struct ifreq interface = {0};

    snprintf(interface.ifr_name, sizeof interface.ifr_name, "%s", name);
    net_ioctl(fd, SIOCGIFFLAGS, &interface, name);
    interface.ifr_flags = (short)(interface.ifr_flags | IFF_UP);
    net_ioctl(fd, SIOCSIFFLAGS, &interface, name);
}

static void set_up_network(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq interface = {.ifr_name = "eth0"};
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};

    if (fd < 0)
        die("network: socket: %s", strerror(errno));
    bring_up(fd, "lo");
    interface.ifr_addr = ip_address(GUEST_ADDRESS);
    net_ioctl(fd, SIOCSIFADDR, &interface, "address of eth0");
    interface.ifr_netmask = ip_address("255.255.255.0");
    net_ioctl(fd, SIOCSIFNETMASK, &interface, "netmask of eth0");
    bring_up(fd, "eth0");
    route.rt_dst = ip_address("0.0.0.0");
    route.rt_genmask = ip_address("0.0.0.0");
    route.rt_gateway = ip_address(GATEWAY_ADDRESS);
    net_ioctl(fd, SIOCADDRT, &route, "default route");
    close(fd);
}

/* Inode tables are not zeroed in the background and freed blocks are given back, so that the
 * scratch disk stays sparse. */
static void mount_disks(void)
{
    make_directory("/scratch", 0755);
    mount_or_die("/dev/vda", "/image", "squashfs", MS_RDONLY, NULL);
    if (mount("/dev/vdb", "/scratch", "ext4", MS_NOATIME, "noinit_itable,discard") != 0)
        mount_or_die("/dev/vdb", "/scratch", "ext4", MS_NOATIME, NULL);
    make_directory("/scratch/upper", 0755);
    make_directory("/scratch/work", 0700);
}

static bool mount_inside(const char *type, const char *name, const char *options)
{
    char path[64];

    snprintf(path, sizeof path, ROOT "%s", name);
    make_directory(path, 0755);
    return mount(type, path, type, MS_NOSUID, options) == 0;
}

static void link_inside(const char *target, const char *path)
{
    if (symlink(target, path) != 0 && errno != EEXIST)
        log_line("symlink %s: %s", path, strerror(errno));
}

static bool mount_names_inside(void)
{
    make_directory(ROOT "/run/torpor", 0755);
    return mount(NAMES, ROOT "/run/torpor", NULL, MS_BIND, NULL) == 0;
}

static bool mount_system_inside(void)
{
    if (!mount_inside("proc", "/proc", NULL) || !mount_inside("sysfs", "/sys", NULL)
        || !mount_inside("devtmpfs", "/dev", NULL)
        || !mount_inside("devpts", "/dev/pts", "ptmxmode=0666,mode=0620,gid=5")
        || !mount_inside("tmpfs", "/dev/shm", "mode=1777")
        || !mount_inside("tmpfs", "/tmp", "mode=1777") || !mount_inside("tmpfs", "/run", "mode=0755")
        || !mount_names_inside())
        return false;
    link_inside("/proc/self/fd", ROOT "/dev/fd");
    link_inside("/proc/self/fd/0", ROOT "/dev/stdin");
    link_inside("/proc/self/fd/1", ROOT "/dev/stdout");
    link_inside("/proc/self/fd/2", ROOT "/dev/stderr");
    return true;
}

static bool mount_root(const char *lower)
{
    char options[256];

    snprintf(options, sizeof options, "lowerdir=%s,upperdir=/scratch/upper,workdir=/scratch/work",
             lower);
    make_directory(ROOT, 0755);
    return mount("overlay", ROOT, "overlay", MS_NOATIME, options) == 0 && mount_system_inside();
}

/* The placeholder's bytes may still be in the block device's cache. */
static bool drop_cache(const char *disk)
{
    int fd = open(disk, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return false;
    bool dropped = ioctl(fd, BLKFLSBUF, 0) == 0;
    close(fd);
    return dropped;
}

/* Replace the image's root by one with the app on top. Nothing may run in the old one. */
bool mount_function_root(char *problem, size_t problem_bytes)
{
    make_directory("/app", 0755);
    umount2(ROOT, MNT_DETACH);
    umount2("/app", MNT_DETACH);
    if (!drop_cache(APP_DISK))
        snprintf(problem, problem_bytes, "app disk: %s", strerror(errno));
    else if (mount(APP_DISK, "/app", "squashfs", MS_RDONLY, NULL) != 0)
        snprintf(problem, problem_bytes, "app disk cannot be mounted: %s", strerror(errno));
    else if (!mount_root("/app:/image"))
        snprintf(problem, problem_bytes, "function root cannot be mounted: %s", strerror(errno));
    else
        return true;
    return false;
}

/* Give the scratch disk back with a clean file system. Nothing may run in the root. */
bool unmount_disks(char *problem, size_t problem_bytes)
{
    umount2(ROOT, MNT_DETACH);
    if (umount2("/scratch", 0) == 0)
        return true;
    snprintf(problem, problem_bytes, "scratch disk cannot be unmounted: %s", strerror(errno));
    return false;
}

/* Everything up to the point where the agent can listen; ends the VM when something is missing. */
void boot(void)
{
    mount_or_die("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, NULL);
    open_console();
    mount_or_die("proc", "/proc", "proc", 0, NULL);
    mount_or_die("sysfs", "/sys", "sysfs", 0, NULL);
    load_modules();
    set_up_network();
    mount_or_die("tmpfs", NAMES, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=1m");
    mount_disks();
    if (!mount_root("/image"))
        die("image root cannot be mounted: %s", strerror(errno));
}
